"""Every failure that docs/explanation/failures-we-prevent.md tells of has tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "explanation" / "failures-we-prevent.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| What happened"))
]


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("test_*.py")]
EXISTING = {node.name for tree in TREES for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_every_failure_names_tests_that_exist(row: list[str]) -> None:
    happened, prevented, tests = row
    named = re.findall(r"`(test_\w+)`", tests)
    assert happened
    assert prevented
    assert named, "no test"
    assert [name for name in named if name not in EXISTING] == []


@pytest.mark.parametrize(
    "subject", ["Slurm", "WANDB_RUN", "port", "GPUs", "line ends", "resumed", "row group", "time limit", "logs"]
)
def test_what_people_suffered_from_is_told(subject: str) -> None:
    assert any(subject in happened for happened, _, _ in ROWS)
