"""Imports run one way, as docs/explanation/design.md says: no room knows the one above it, and there are no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nanochat"
DESIGN = SOURCE.parents[1] / "docs" / "explanation" / "design.md"

# From the ground up. Those on one floor may import each other, but not in a circle.
FLOORS = (
    ("workspace", "config", "runtime", "compiled_code", "identity", "files", "errors"),
    ("corpus",),
    ("model", "optim", "loader", "tokenizer", "tasks"),
    ("training", "evaluation", "tracking", "chat", "export", "checkpoint", "cluster"),
    ("data_stages", "pipeline"),
    ("experiment",),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"__init__", "__main__"}


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere, but for those that only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if module_path(name) else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("nanochat.")}


def module_path(name: str) -> Path | None:
    """The file of a module of this package, if there is one."""
    base = SOURCE.joinpath(*name.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def modules() -> dict[str, Path]:
    paths = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def room(module: str) -> str:
    return module.split(".")[1]


INSIDE = {name: path for name, path in modules().items() if "." in name and room(name) not in ENTRANCES}


def test_every_room_is_on_a_floor() -> None:
    assert {room(name) for name in INSIDE} == set(FLOOR_OF)


@pytest.mark.parametrize("name", sorted(INSIDE))
def test_no_module_imports_from_a_floor_above(name: str) -> None:
    above = {used for used in imports_of(INSIDE[name]) if FLOOR_OF[room(used)] > FLOOR_OF[room(name)]}
    assert not above, f"{name} is below {', '.join(sorted(above))}"


def test_no_rooms_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in INSIDE.items():
        graph.setdefault(room(name), set()).update({room(used) for used in imports_of(path)} - {room(name)})
    TopologicalSorter(graph).prepare()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imports_of(path) - {name} for name, path in INSIDE.items()}
    TopologicalSorter(graph).prepare()


def test_the_floors_are_those_of_the_design() -> None:
    rows = [line.split("|")[1:3] for line in DESIGN.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    documented = {
        int(floor): set(rooms.replace("`", "").replace(" ", "").split(","))
        for floor, rooms in rows[1:]
        if floor.strip().isdigit()
    }
    assert documented == {floor: set(rooms) for floor, rooms in enumerate(FLOORS)}
