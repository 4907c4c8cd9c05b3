import ast
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanochat.corpus import standard_library
from nanochat.corpus.builtin import REPEATED_PARAGRAPH_CHARACTERS, build_builtin_corpus, builtin_texts
from nanochat.corpus.shards import open_corpus, read_texts
from nanochat.corpus.standard_library import (
    DescribedObject,
    ModuleText,
    described_objects,
    read_modules,
    reference_topics,
)
from nanochat.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("builtin") / "corpus"
    build_builtin_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def splits(folder: Path) -> tuple[list[str], list[str]]:
    return list(read_texts(folder, "train", "fix")), list(read_texts(folder, "val", "fix"))


@pytest.fixture(scope="module")
def modules() -> list[ModuleText]:
    return list(read_modules())


@pytest.fixture(scope="module")
def described(modules: list[ModuleText]) -> dict[str, DescribedObject]:
    return {item.name: item for item in described_objects(modules)}


def test_there_is_enough_text_of_every_kind_to_train_on(folder: Path) -> None:
    corpus = open_corpus(folder, "fix", checksums=True)
    kinds = corpus.manifest["details"]["kinds"]
    assert set(kinds) == {"topic", "docstring", "source"}
    totals = corpus.manifest["totals"]
    total_bytes = totals["train"]["text_bytes"] + totals["val"]["text_bytes"]
    assert sum(kind["text_bytes"] for kind in kinds.values()) == total_bytes
    assert total_bytes > 7_000_000
    assert 4 <= len(corpus.train_shards) <= 8
    assert len(corpus.val_shards) == 1
    assert 0.03 <= totals["val"]["text_bytes"] / total_bytes <= 0.06


def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, decimal, json, unittest.mock; from pathlib import Path; "
        "from nanochat.corpus.builtin import build_builtin_corpus; build_builtin_corpus(Path(sys.argv[1]))"
    )
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the working folder was imported')")
    subprocess.run(
        [sys.executable, "-P", "-OO", "-W", "error", "-c", program, str(tmp_path / "corpus")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0"},
        check=True,
    )
    for shard in sorted(folder.glob("*.parquet")):
        assert (tmp_path / "corpus" / shard.name).read_bytes() == shard.read_bytes()
    assert open_corpus(tmp_path / "corpus", "fix").fingerprint == open_corpus(folder, "fix").fingerprint


def test_no_long_paragraph_stands_twice_so_none_is_trained_and_validated_on(
    splits: tuple[list[str], list[str]],
) -> None:
    train, val = splits
    paragraphs = Counter(
        " ".join(paragraph.split())
        for text in train + val
        for paragraph in re.split(r"\n\n+", text.partition("\n\n")[2])
    )
    twice = [text for text, n in paragraphs.items() if n > 1 and len(text) >= REPEATED_PARAGRAPH_CHARACTERS]
    assert twice == []
    assert len(set(train + val)) == len(train + val)


def test_every_shard_mixes_all_kinds(folder: Path) -> None:
    kind_of = {document.text: document.kind for document in builtin_texts()}
    corpus = open_corpus(folder, "fix")
    per_shard: dict[str, Counter[str]] = {}
    for split in ("train", "val"):
        texts = read_texts(folder, split, "fix")
        for entry in corpus.manifest["files"]:
            if entry["split"] == split:
                per_shard[entry["name"]] = Counter(kind_of[next(texts)] for _ in range(entry["rows"]))
    for kinds in per_shard.values():
        rows = kinds.total()
        assert 0.6 < kinds["docstring"] / rows < 0.9
        assert 0.1 < kinds["source"] / rows < 0.4
    assert sum(kinds["topic"] > 0 for kinds in per_shard.values()) >= len(per_shard) - 1


def test_texts_are_clean_and_free_of_this_machine(splits: tuple[list[str], list[str]]) -> None:
    for text in splits[0] + splits[1]:
        assert text == text.strip("\n")
        assert text.strip()
        assert not re.search(r"[\x00\x0b\x0c\r]", text)
        assert sysconfig.get_path("stdlib") not in text


@pytest.mark.parametrize(
    ("name", "title", "prose"),
    [
        ("os.path.join", "os.path.join(a, *p)", "Join two or more pathname components"),
        ("json.loads", "json.loads(s, *, ", "Deserialize"),
        ("json.JSONDecoder", "class json.JSONDecoder(*, object_hook=None", "Simple JSON"),
        ("asyncio.sleep", "asyncio.sleep(delay, result=None)", "Coroutine that completes"),
        ("heapq.heappush", "heapq.heappush(heap, item)", "Push"),
        (
            "collections.abc.Set.isdisjoint",
            "collections.abc.Set.isdisjoint(other)",
            "Return True if two sets",
        ),
        ("shutil.which", "shutil.which(cmd, mode=", "Given a command"),
        ("len", "len(obj, /)", "Return the number of items in a container."),
        ("str.join", "str.join(iterable, /)", "Concatenate any number of strings."),
        ("math.sqrt", "math.sqrt(x, /)", "Return the square root of x."),
        ("os.listdir", "os.listdir(path=None)", "Return a list"),
        ("textwrap", "module textwrap", "Text wrapping and filling."),
    ],
)
def test_objects_are_described_under_the_names_people_use(
    described: dict[str, DescribedObject], name: str, title: str, prose: str
) -> None:
    assert described[name].title.startswith(title)
    assert described[name].prose.startswith(prose)


def test_a_docstring_document_is_title_and_prose(splits: tuple[list[str], list[str]]) -> None:
    texts = [text for text in splits[0] + splits[1] if text.startswith("textwrap.dedent(text)\n\n")]
    assert len(texts) == 1
    assert "Remove any common leading whitespace" in texts[0]


def test_sources_without_their_docstrings_are_still_python(modules: list[ModuleText]) -> None:
    for module in modules[::7]:
        tree = ast.parse("\n".join(module.sources))
        kept = [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node)
        ]
        assert kept == [], module.name


def test_tests_tables_and_other_packages_are_left_out(modules: list[ModuleText]) -> None:
    names = {module.name for module in modules}
    assert {"json.decoder", "asyncio", "os", "encodings.cp1252"} <= names
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "pytest", "nanochat"}
    (code_page,) = [module for module in modules if module.name == "encodings.cp1252"]
    assert "def getregentry" in "".join(code_page.sources)
    assert "EURO SIGN" not in "".join(code_page.sources)


def standard_library_at(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))


def test_a_python_without_sources_is_told_to_bring_its_own_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(standard_library, "COMPILED_MODULES", ())
    standard_library_at(monkeypatch, tmp_path / "nowhere")
    assert list(reference_topics()) == []
    with pytest.raises(UsageError, match=r"ships only 0 documents.*nanochat data local"):
        build_builtin_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_zipped_standard_library_reads_like_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "lib" / "json").mkdir(parents=True)
    (tmp_path / "lib" / "json" / "__init__.py").write_text('"""Read and write JSON."""\nVERSION = 1\n')
    (tmp_path / "lib" / "textwrap.py").write_text('def fill(text):\n    """Fill a paragraph."""\n')
    (tmp_path / "lib" / "intruder.py").write_text("x = 1\n")
    archive = tmp_path / f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for path in sorted((tmp_path / "lib").rglob("*.py")):
            stream.write(path, path.relative_to(tmp_path / "lib").as_posix())
    standard_library_at(monkeypatch, tmp_path / "lib")
    from_folder = list(read_modules())
    standard_library_at(monkeypatch, tmp_path / "nowhere")
    monkeypatch.setattr(sys, "path", [str(archive)])
    assert list(read_modules()) == from_folder
    assert [module.name for module in from_folder] == ["json", "textwrap"]


def test_files_that_are_no_python_are_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "os.py").write_text("def broken(:\n")
    (tmp_path / "re.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "sys.py").write_bytes(b"x = 1\x00\n")
    (tmp_path / "io.py").write_text("x = 1\n")
    standard_library_at(monkeypatch, tmp_path)
    assert [module.name for module in read_modules()] == ["io"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(): "doc"\n', "def f(): pass\n"),
        ('def f():\n    """Ü doc."""; return 1\n', "def f():\n    pass; return 1\n"),
        ('def f():\n    """doc\n\n    more\n    """  # note\n    return 1\n', "def f():\n    return 1\n"),
        ('class A:\n    "doc"\n', "class A:\n    pass\n"),
        ('"doc"\nx = 1\n', "x = 1\n"),
        ('x = "kept"\n', 'x = "kept"\n'),
    ],
)
def test_taking_out_a_docstring_leaves_the_rest_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, expected: str
) -> None:
    (tmp_path / "io.py").write_text(source, encoding="utf-8")
    standard_library_at(monkeypatch, tmp_path)
    (module,) = read_modules()
    assert "\n".join(module.sources).strip() == expected.strip()
    assert len(module.descriptions) == ("doc" in source)


def test_building_twice_keeps_the_first(folder: Path) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    manifest: dict[str, Any] = build_builtin_corpus(folder)
    assert manifest["source"]["name"] == "builtin"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
