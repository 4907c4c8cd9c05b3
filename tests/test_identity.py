"""What code this is: told by whoever knows it best, the same in `--version` and in what a run records."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from nanochat import identity
from nanochat.errors import DataError
from nanochat.identity import describe_commit, describe_image, installed_version, read_image, version_line

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

IMAGE = {"variant": "cpu", "revision": "fedcba9876543210", "fingerprint": "0123456789abcdef" * 4, "python": []}


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *who, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def copy_of_the_code(folder: Path) -> Path:
    """What `identity.py` needs to be imported, below `src` in a folder."""
    original = Path(identity.__file__)
    copy = folder / "src" / "nanochat"
    copy.mkdir(parents=True)
    for name in ("__init__.py", "identity.py", "errors.py"):
        shutil.copy(original.with_name(name), copy)
    return copy


def ask(copy: Path, expression: str, **variables: str) -> Any:
    """The value of an expression on `identity`, as that copy of the code sees it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
    program = f"import json; from pathlib import Path; from nanochat.identity import *; print(json.dumps({expression}))"
    environment = {**kept, "PYTHONPATH": str(copy.parent), **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=copy
    )
    return json.loads(done.stdout)


def write_image(folder: Path, content: Any = IMAGE) -> Path:
    manifest = folder / "manifest.json"
    manifest.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return manifest


@pytest.mark.parametrize(("told", "dirty"), [("abc123", False), ("abc123-dirty", True)])
def test_the_variable_wins_and_tells_whether_the_code_was_changed(
    told: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_GIT_COMMIT", told)
    assert describe_commit(write_image(tmp_path)) == {"commit": "abc123", "dirty": dirty}


@needs_git
def test_a_checkout_tells_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert ask(copy, "describe_commit()") == {"commit": commit, "dirty": False}
    assert f"(commit {commit[:7]}, " in ask(copy, "version_line()")
    (copy / "__init__.py").write_text("changed = True\n", encoding="utf-8")
    assert ask(copy, "describe_commit()") == {"commit": commit, "dirty": True}
    assert f"(commit {commit[:7]}-dirty, " in ask(copy, "version_line()")


@needs_git
def test_an_installation_inside_another_repository_does_not_take_its_commit(tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path)
    (tmp_path / "other").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "first")
    assert ask(copy, "describe_commit()") == {}


def test_the_code_that_an_image_brings_is_of_the_images_commit_and_other_code_is_not(tmp_path: Path) -> None:
    image, elsewhere = tmp_path / "image", tmp_path / "elsewhere"
    brought, other = copy_of_the_code(image), copy_of_the_code(elsewhere)
    manifest = f"Path({str(write_image(image))!r})"
    assert ask(brought, f"describe_commit({manifest})") == {"commit": IMAGE["revision"], "dirty": False}
    assert ask(other, f"describe_commit({manifest})") == {}
    assert "(commit fedcba9, torch " in ask(brought, f"version_line({manifest})")


def test_what_pip_installed_from_a_repository_is_of_the_commit_that_pip_noted(tmp_path: Path) -> None:
    copy = copy_of_the_code(tmp_path)
    metadata = copy.parent / "nanochat_hpc-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nanochat-hpc\nVersion: 9.9\n", encoding="utf-8")
    noted = {"url": "https://example.org/nanochat", "vcs_info": {"vcs": "git", "commit_id": "abcdef0123"}}
    (metadata / "direct_url.json").write_text(json.dumps(noted), encoding="utf-8")
    assert ask(copy, "version_line()").startswith("nanochat 9.9 (commit abcdef0, torch ")


def test_the_version_names_the_image_and_its_fingerprint(tmp_path: Path) -> None:
    line = version_line(write_image(tmp_path))
    assert line.startswith(f"nanochat {version('nanochat-hpc')} (")
    assert line.endswith(f"torch {version('torch')}, image cpu fingerprint 0123456789abcdef)")
    assert "image" not in version_line(tmp_path / "missing.json")


def test_an_image_is_recorded_without_its_lists_of_packages(tmp_path: Path) -> None:
    recorded = {name: IMAGE[name] for name in ("variant", "revision", "fingerprint")}
    assert describe_image(write_image(tmp_path)) == recorded
    assert describe_image(tmp_path / "missing.json") == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', '{"variant": "cpu"}'])
def test_a_damaged_manifest_is_an_error_and_not_no_image(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"manifest\.json .* build or copy the image again"):
        read_image(write_image(tmp_path, content))


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert installed_version("no-such-package") is None


def test_the_version_does_not_wait_for_torch(tmp_path: Path) -> None:
    seen = ask(copy_of_the_code(tmp_path), "[version_line(), 'torch' in __import__('sys').modules]")
    assert seen[0].startswith("nanochat ")
    assert seen[1] is False
