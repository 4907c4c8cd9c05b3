"""Names and paths: what is refused, and that nothing leaves the workspace."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.workspace import Workspace, check_name, check_run_name


@pytest.mark.parametrize("name", ["", " ", "dummy"])
def test_a_run_name_that_names_nothing_is_refused_with_the_fix(name: str) -> None:
    with pytest.raises(UsageError, match="--run my_first_run"):
        check_run_name(name)


@given(st.text(max_size=200))
def test_no_name_leaves_the_workspace(name: str) -> None:
    workspace = Workspace(Path("/workspace"))
    try:
        path = workspace.checkpoints("base", name)
    except UsageError:
        return
    assert path.parent == Path("/workspace/base_checkpoints")
    assert path.resolve().parent == path.parent


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-flag", "a b", "a\n", "x" * 129, "é"])
def test_names_that_are_unsafe_as_file_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not usable as a file name"):
        check_name(name, "model tag")


def test_an_empty_base_dir_is_refused_not_read_as_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    with pytest.raises(UsageError, match="NANOCHAT_BASE_DIR is set but empty"):
        Workspace.from_environment()


def test_the_base_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert Workspace.from_environment().root == tmp_path
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    assert Workspace.from_environment().root == Path.home() / ".cache" / "nanochat"
