"""`nanochat stage` brings data sets whole or not at all, leaves out what no task reads, and says why it failed."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_copies import arc_row, write_all, write_parquet
from hub_server import COMMIT, HubServer, hub_server

from nanochat.errors import ExitCode
from nanochat.files import read_manifest, verify_files
from nanochat.tasks.registry import STAGED, describe_task, open_task
from nanochat.workspace import Workspace

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    copies, root = tmp_path / "copies", tmp_path / "hub"
    write_all(copies)
    for folder in copies.iterdir():
        owner, name = folder.name.split("--")
        (root / owner).mkdir(parents=True, exist_ok=True)
        folder.rename(root / owner / name)
    with hub_server(root) as server:
        yield server


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def stage(
    hub: HubServer, workspace: Workspace, run_command: Callable[..., Result], tmp_path: Path
) -> Callable[..., Result]:
    def run(*arguments: str, **environment: str) -> Result:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", **environment}
        return run_command("stage", *arguments, workspace=workspace.root, **environment)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_data_set_comes_whole_with_a_manifest_and_opens(
    stage: Callable[..., Result], workspace: Workspace
) -> None:
    result = stage()
    assert result.returncode == 0, result.stderr
    folder = workspace.task_data / "cais--mmlu"
    assert names(folder) == [
        "README.md",
        "all/test-00000-of-00001.parquet",
        "auxiliary_train/train-00000-of-00001.parquet",
        "manifest.json",
    ]
    manifest = read_manifest(folder, "task_data", "")
    verify_files(folder, manifest["files"], "")
    assert manifest["source"] == {"repository": "cais/mmlu", "revision": COMMIT}
    for name in STAGED:
        assert len(open_task(name, workspace.task_data).problems("train")) > 0


def test_what_is_there_is_kept_without_asking_the_hub(
    stage: Callable[..., Result], workspace: Workspace, hub: HubServer
) -> None:
    assert "arc-easy: " in stage("arc-easy").stdout
    before = describe_task("arc-challenge", workspace.task_data)
    hub.requests.clear()
    result = stage("arc-easy", "arc-challenge")
    assert result.stdout.count("was there") == 2
    assert hub.requests == []
    assert describe_task("arc-challenge", workspace.task_data) == before


def test_a_copy_elsewhere_is_described_alike_whatever_its_times(
    stage: Callable[..., Result], workspace: Workspace, tmp_path: Path
) -> None:
    import shutil

    stage("gsm8k")
    shutil.copytree(workspace.task_data, tmp_path / "copy", copy_function=shutil.copyfile)
    assert describe_task("gsm8k", tmp_path / "copy") == describe_task("gsm8k", workspace.task_data)


@pytest.mark.parametrize(
    ("status", "fix"),
    [(401, "hf auth login"), (403, "hf auth login"), (404, "check HF_ENDPOINT"), (429, "wait some minutes")],
)
def test_a_refusal_is_one_line_with_what_to_do(
    stage: Callable[..., Result], workspace: Workspace, hub: HubServer, status: int, fix: str
) -> None:
    hub.refuse_with = status
    result = stage("gsm8k")
    assert result.returncode == ExitCode.FAILED
    (line,) = result.stderr.splitlines()
    assert f"openai/gsm8k at main was not downloaded: the hub answered {status} — " in line
    assert fix in line
    assert names(workspace.task_data) == [".lock"]


@pytest.mark.parametrize("lose_after", [0, 1, 3])
def test_a_lost_connection_leaves_nothing_behind_and_the_next_attempt_succeeds(
    stage: Callable[..., Result], workspace: Workspace, hub: HubServer, lose_after: int
) -> None:
    hub.lose_after = lose_after
    result = stage("gsm8k")
    assert result.returncode == ExitCode.FAILED
    assert "openai/gsm8k at main was not downloaded: " in result.stderr.splitlines()[-1]
    assert names(workspace.task_data) == [".lock"]
    hub.lose_after = None
    assert stage("gsm8k").returncode == 0


def test_offline_mode_is_said(stage: Callable[..., Result]) -> None:
    assert "HF_HUB_OFFLINE is set — unset HF_HUB_OFFLINE" in stage("gsm8k", HF_HUB_OFFLINE="1").stderr


def test_a_repository_without_the_files_is_refused(stage: Callable[..., Result], hub: HubServer) -> None:
    for path in hub.root.glob("openai/gsm8k/main/test-*"):
        path.unlink()
    result = stage("gsm8k")
    assert result.returncode == ExitCode.DATA_DAMAGED
    assert "openai/gsm8k has no files main/test-*.parquet — choose another --revision" in result.stderr


def test_files_of_ones_own_are_not_replaced(stage: Callable[..., Result], workspace: Workspace) -> None:
    write_parquet(workspace.task_data / "allenai--ai2_arc/ARC-Easy/test-0.parquet", [arc_row("mine", "AB", "A")])
    result = stage("arc-easy")
    assert result.returncode == ExitCode.USAGE
    assert "was put there by hand and lacks files of arc-easy — move it away" in result.stderr
    assert names(workspace.task_data / "allenai--ai2_arc") == ["ARC-Easy/test-0.parquet"]


@pytest.mark.parametrize("name", ["library", "gms8k"])
def test_a_task_without_files_is_refused(stage: Callable[..., Result], name: str) -> None:
    result = stage(name)
    assert result.returncode == ExitCode.USAGE
    assert f"{name!r} is not a task that is staged — choose of: arc-challenge, arc-easy, gsm8k" in result.stderr
