"""The text that every Python carries: its reference topics, its documentation strings and its own sources.

Sources are parsed with `ast`, never imported, so a module's side effects, an installed package or a patched
attribute cannot change what comes out. Only compiled modules, which have no source to parse, are imported,
from a list of ones that do nothing on import; of them only text that is fixed in C is taken.
"""

import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path

# A few thousand characters hold a definition or a section whole and fit a small model's context.
DOCUMENT_CHARACTERS = 4000

# Tests would double the text with what nobody wants to learn from; the rest is not the standard library.
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

COMPILED_MODULES = (
    "_asyncio",
    "_bisect",
    "_collections",
    "_csv",
    "_datetime",
    "_decimal",
    "_functools",
    "_heapq",
    "_io",
    "_operator",
    "_pickle",
    "_queue",
    "_random",
    "_socket",
    "_statistics",
    "_string",
    "_struct",
    "_thread",
    "_weakref",
    "array",
    "binascii",
    "builtins",
    "cmath",
    "errno",
    "fcntl",
    "gc",
    "itertools",
    "marshal",
    "math",
    "mmap",
    "posix",
    "re",
    "select",
    "sys",
    "time",
    "types",
    "unicodedata",
    "zlib",
)

# Modules that people know by another name and that do not say so in an `__all__` or a star import.
PUBLIC_MODULE_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "_random": "random",
    "genericpath": "os.path",
    "posix": "os",
    "posixpath": "os.path",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class DescribedObject:
    """One object of the standard library and what its documentation string says about it.

    Attributes:
        name: the name people use: `os.path.join`, `str.split`, `asyncio.sleep`.
        title: the name as one would look it up: `os.path.join(a, *p)`, `class io.StringIO(...)`, `module os`.
        prose: the documentation string, dedented.
    """

    name: str
    title: str
    prose: str


@dataclass(frozen=True)
class _Description:
    """A documentation string before it is known under which public name its object goes."""

    path: tuple[str, ...]
    prefix: str
    signature: str
    prose: str


@dataclass
class ModuleText:
    """One module's text: its source cut into documents, and the documentation strings taken out of it.

    Attributes:
        sources: the source without documentation strings, in documents of whole definitions.
        exports: the names in `__all__`, `None` without one.
        imports: every (module, name) it imports at top level under the same name, `*` for all names.
    """

    name: str
    file: str
    sources: list[str] = field(default_factory=list)
    descriptions: list[_Description] = field(default_factory=list)
    exports: frozenset[str] | None = None
    imports: list[tuple[str, str]] = field(default_factory=list)


def reference_topics() -> Iterator[tuple[str, str]]:
    """Yield (heading, body) of every section of Python's reference topics, the shortest topics first.

    Long topics repeat short ones; so whoever drops repetitions keeps the specific topic.
    """
    file = dict(_module_files()).get("pydoc_data.topics")
    parsed = _parse(file) if file else None
    if parsed is None:
        return  # Some distributions leave the topics out.
    assignments = (statement for statement in parsed[1].body if isinstance(statement, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(next(assignments).value)
    for topic in sorted(topics, key=lambda key: (len(topics[key]), key)):
        yield from _sections(topics[topic])


def read_modules() -> Iterator[ModuleText]:
    """Yield the text of every module of the standard library that comes with its source, in name order."""
    for name, file in _module_files():
        parsed = _parse(file)
        if parsed is not None:
            is_package = file.name == "__init__.py"
            yield _module_text(name, is_package, *parsed)


def described_objects(modules: Sequence[ModuleText]) -> Iterator[DescribedObject]:
    """Yield every object with a documentation string, once, under the name people use for it.

    A documentation string in Python source is preferred to that of its twin in C: it comes with a signature.
    """
    public_name = _PublicNames(modules)
    compiled = ((name, description) for name in COMPILED_MODULES for description in _compiled_text(name))
    sourced = ((module.name, description) for module in modules for description in module.descriptions)
    seen: set[str] = set()
    for module_name, description in itertools.chain(sourced, compiled):
        name = public_name(module_name, description.path)
        if name not in seen:
            seen.add(name)
            title = f"{description.prefix}{name}{description.signature}"
            yield DescribedObject(name, title, description.prose)


class _PublicNames:
    """Knows `json.JSONDecoder` for `json.decoder.JSONDecoder`, and `heapq.heappush` for `_heapq.heappush`.

    A private or nested module's object is known by the module that re-exports it: in its `__all__`, or with a
    star import.
    """

    def __init__(self, modules: Iterable[ModuleText]) -> None:
        self._exports = {module.name: module.exports for module in modules}
        self._starred: dict[str, str] = {}
        self._named: dict[tuple[str, str], str] = {}
        for module in modules:
            if any(part.startswith("_") for part in module.name.split(".")):
                continue
            for origin, name in module.imports:
                if not (origin.startswith((module.name + ".", "_")) or "._" in origin):
                    continue
                if name == "*":
                    self._starred.setdefault(origin, module.name)
                elif name in (module.exports or ()):
                    self._named.setdefault((origin, name), module.name)

    def __call__(self, module: str, path: tuple[str, ...]) -> str:
        home = PUBLIC_MODULE_NAMES.get(module, module)
        if path:
            exports = self._exports.get(module)
            is_exported = path[0] in exports if exports is not None else not path[0].startswith("_")
            if (module, path[0]) in self._named:
                home = self._named[module, path[0]]
            elif module in self._starred and is_exported:
                home = self._starred[module]
        if home == "builtins" and path:
            return ".".join(path)
        return ".".join((home, *path))


def _module_files() -> Iterator[tuple[str, Traversable]]:
    """Yield (module name, source file) of the running Python's standard library, sorted by name."""
    roots: list[Traversable] = [Path(sysconfig.get_path("stdlib"))]
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    archives = [Path(entry) for entry in sys.path if Path(entry).name == archive]
    roots += [zipfile.Path(path) for path in archives if path.is_file()]
    seen: set[str] = set()
    for root in roots:
        found = _walk(root, (), sys.stdlib_module_names)
        for name, file in sorted(found, key=lambda item: (item[0], item[1].name)):
            if name not in seen:
                seen.add(name)
                yield name, file


def _walk(
    folder: Traversable, package: tuple[str, ...], allowed: frozenset[str] | None
) -> Iterator[tuple[str, Traversable]]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        stem = entry.name.removesuffix(".py")
        if allowed is not None and stem not in allowed:
            continue
        if entry.is_dir():
            if entry.name not in EXCLUDED_FOLDERS and entry.joinpath("__init__.py").is_file():
                yield from _walk(entry, (*package, entry.name), None)
        elif entry.name == "__init__.py":
            yield ".".join(package), entry
        elif entry.name.endswith(".py") and stem.isidentifier():
            yield ".".join((*package, stem)), entry


def _parse(file: Traversable) -> tuple[str, ast.Module] | None:
    """A file's source and its tree; `None` for files that are there to be wrong, as some test data is."""
    with warnings.catch_warnings():
        # A few standard modules have escape sequences that newer Pythons warn about.
        warnings.simplefilter("ignore")
        try:
            source = importlib.util.decode_source(file.read_bytes())
            return source, ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _module_text(name: str, is_package: bool, source: str, tree: ast.Module) -> ModuleText:
    module = ModuleText(name, name.replace(".", "/") + ("/__init__.py" if is_package else ".py"))
    lines: list[str | None] = list(source.split("\n"))
    _take_docstring(tree, _Description((), "module ", "", ""), module, lines)
    for node, path, owner in _definitions(tree, (), None):
        _take_docstring(node, _describe(node, path, owner), module, lines)
    top_level = [statement for statement in tree.body if not isinstance(statement, DEFINITIONS)]
    for statement in ast.walk(ast.Module(top_level, [])):
        if isinstance(statement, ast.ImportFrom):
            origin = _import_origin(statement, name, is_package)
            module.imports += [(origin, alias.name) for alias in statement.names if alias.asname is None]
    module.exports = _exports(tree)
    module.sources = _pack(_pieces(tree.body, lines, 0, len(lines)))
    return module


def _definitions(
    node: ast.AST, path: tuple[str, ...], owner: ast.ClassDef | None
) -> Iterator[tuple[Definition, tuple[str, ...], ast.ClassDef | None]]:
    """Every class and function with its path of names and the class it is directly in."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, DEFINITIONS):
                inner = (*path, child.name)
                yield child, inner, owner
                yield from _definitions(child, inner, child if isinstance(child, ast.ClassDef) else None)
            else:
                yield from _definitions(child, path, owner)


def _import_origin(statement: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parents = parts[: len(parts) - statement.level + (1 if is_package else 0)]
    return ".".join([*parents, *([statement.module] if statement.module else [])])


def _exports(tree: ast.Module) -> frozenset[str] | None:
    """The names in literal `__all__` lists; `None` if the module has none."""
    names: set[str] = set()
    found = False
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                found = True
                names |= {
                    item.value
                    for item in ast.walk(statement.value)
                    if isinstance(item, ast.Constant) and isinstance(item.value, str)
                }
    return frozenset(names) if found and names else None


def _describe(node: Definition, path: tuple[str, ...], owner: ast.ClassDef | None) -> _Description:
    if isinstance(node, ast.ClassDef):
        makers = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        maker = makers.get("__init__") or makers.get("__new__")
        return _Description(path, "class ", _signature(maker, is_method=True) if maker else "", "")
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "setter", "getter", "deleter"}:
        return _Description(path, "", "", "")
    return _Description(path, "", _signature(node, is_method=owner is not None), "")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> str:
    arguments = ast.unparse(node.args)
    if is_method:
        arguments = re.sub(r"^(self|cls)\b(, /)?(, )?", "", arguments)
    return f"({arguments})"


def _take_docstring(
    node: Definition | ast.Module, description: _Description, module: ModuleText, lines: list[str | None]
) -> None:
    """Move a documentation string from the source lines to the module's descriptions."""
    prose = ast.get_docstring(node)
    if prose is None:
        return
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    assert docstring.end_col_offset is not None
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    # Columns count UTF-8 bytes.
    before = (lines[first] or "").encode()[: docstring.col_offset].decode()
    after = (lines[last] or "").encode()[docstring.end_col_offset :].decode()
    lines[first : last + 1] = [None] * (last + 1 - first)
    is_only_statement = len(node.body) == 1 and not isinstance(node, ast.Module)
    shares_its_line = before.strip() != "" or not re.fullmatch(r"\s*(#.*)?", after)
    if is_only_statement or shares_its_line:
        lines[first] = f"{before}pass{after}"
    if prose.strip():
        module.descriptions.append(
            _Description(description.path, description.prefix, description.signature, tidy(prose))
        )


def _pieces(body: Sequence[ast.stmt], lines: Sequence[str | None], start: int, end: int) -> Iterator[str]:
    """Cut source lines at statements, long classes at their methods; comments go with what follows them."""
    for statement in body:
        assert statement.end_lineno is not None
        if _is_string(statement):
            continue  # What is left around it, such as the class's line, leads what follows.
        text = _join(lines[start : statement.end_lineno])
        if isinstance(statement, ast.ClassDef) and len(text) > DOCUMENT_CHARACTERS:
            # Every later part of a class repeats the class's line, so that methods are seen as methods.
            bases = ", ".join(map(ast.unparse, statement.bases))
            class_line = f"\n\nclass {statement.name}({bases}):" if bases else f"\n\nclass {statement.name}:"
            first, *rest = _pack(_pieces(statement.body, lines, start, statement.end_lineno))
            yield first
            yield from (f"{class_line}\n{part}" for part in rest)
        elif _is_table(statement):
            yield _join(lines[start : statement.lineno - 1])
        else:
            yield text
        start = max(start, statement.end_lineno)
    yield _join(lines[start:end])


def _is_string(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_table(statement: ast.stmt) -> bool:
    """Whether a statement is data in Python's clothes: a code page, the entities of HTML, the topics."""
    num_lines = (statement.end_lineno or statement.lineno) - statement.lineno + 1
    if num_lines <= 100 or isinstance(statement, DEFINITIONS):
        return False
    return sum(isinstance(node, ast.Name) for node in ast.walk(statement)) * 10 < num_lines


def _join(lines: Iterable[str | None]) -> str:
    return "\n".join(line for line in lines if line is not None)


def _pack(pieces: Iterable[str], separator: str = "\n") -> list[str]:
    """Join consecutive pieces into documents of at most DOCUMENT_CHARACTERS; a longer piece stays whole."""
    documents: list[str] = []
    for piece in filter(str.strip, pieces):
        if documents and len(documents[-1]) + len(piece) < DOCUMENT_CHARACTERS:
            documents[-1] += separator + piece
        else:
            documents.append(piece)
    return documents


def _sections(topic: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^(\S.*)\n([*=~^\"'+-])\2{2,}$", tidy(topic), flags=re.MULTILINE)
    for heading, text in [("", parts[0]), *zip(parts[1::3], parts[3::3])]:
        # Indented paragraphs belong to the entry above them.
        entries = re.split(r"\n\n+(?=\S)", text.strip("\n"))
        for body in _pack(entries, "\n\n"):
            yield heading, body


def _compiled_text(name: str) -> Iterator[_Description]:
    """The documentation of a module written in C; nothing if this Python was built without it."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    for attribute, value in sorted(vars(module).items()):
        # Hooks are what debuggers and notebooks replace.
        if attribute.startswith("_") or attribute.endswith("hook"):
            continue
        if isinstance(value, types.BuiltinFunctionType):
            yield from _compiled_description((attribute,), value)
        elif isinstance(value, type) and _is_compiled(value) and value.__name__ == attribute:
            yield from _compiled_description((attribute,), value)
            for member_name, member in sorted(vars(value).items()):
                if not member_name.startswith("_"):
                    yield from _compiled_description((attribute, member_name), member)


def _is_compiled(value: type) -> bool:
    return not any(isinstance(member, types.FunctionType) for member in vars(value).values())


def _compiled_description(path: tuple[str, ...], value: object) -> Iterator[_Description]:
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    documentation = getattr(value, "__doc__", None)
    is_descriptor = isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType)
    is_callable = isinstance(
        value, type | types.BuiltinFunctionType | types.MethodDescriptorType | types.ClassMethodDescriptorType
    )
    # An address would differ from run to run.
    if not (is_descriptor or is_callable) or not documentation or " at 0x" in documentation:
        return
    prose = tidy(inspect.cleandoc(documentation))
    signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"^\(\$\w+(, /)?(, )?", "(", signature)
    # Without a machine-readable signature, the first line is one by custom: "B.find(sub[, start]) -> int".
    first_line = re.match(rf"(?:\w+\.)?{path[-1]}(\(.*)\n+(?=[A-Z]\w*\s)", prose)
    if not signature and first_line:
        signature, prose = first_line[1], prose[first_line.end() :]
    prefix = "class " if isinstance(value, type) else ""
    yield _Description(path, prefix, signature, prose)


def tidy(text: str) -> str:
    """Drop form feeds, trailing spaces and runs of more than two blank lines."""
    text = re.sub(r"[ \t\f]+$", "", text.replace("\f", ""), flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
