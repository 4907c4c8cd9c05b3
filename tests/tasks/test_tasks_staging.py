"""`nanochat stage` brings all that a run reads, whole or not at all, lists it, and says why it failed."""

import hashlib
import io
import json
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_copies import arc_row, write_all, write_parquet

from hub_server import COMMIT, HubServer, hub_server
from nanochat.config import EvalConfig, RunConfig, TokenizerConfig, TrainBaseConfig, TrainMidConfig, TrainSFTConfig
from nanochat.errors import DataError, ExitCode, NanochatError
from nanochat.files import read_manifest, verify_files, write_json, write_manifest
from nanochat.tasks import staging
from nanochat.tasks.inventory import check_inventory
from nanochat.tasks.registry import STAGED, describe_task, open_task
from nanochat.tokenizer.evaluate import PeerTokenizer, load_peer
from nanochat.tracking.console import Console
from nanochat.workspace import Workspace

Result = subprocess.CompletedProcess[str]


def write_bundle(path: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    copies, root = tmp_path / "copies", tmp_path / "hub"
    write_all(copies)
    for folder in copies.iterdir():
        owner, name = folder.name.split("--")
        (root / owner).mkdir(parents=True, exist_ok=True)
        folder.rename(root / owner / name)
    write_bundle(root / "eval_bundle.zip", {"eval_bundle/core.yaml": "icl_tasks: []", "eval_bundle/eval_data/a": "{}"})
    with hub_server(root) as server:
        yield server


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def about(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """The variables that make the server on the loopback the hub, and everything else."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "",
        "NANOCHAT_EVAL_BUNDLE_URL": f"{hub.endpoint}/files/eval_bundle.zip",
        "NANOCHAT_ENCODINGS_URL": f"{hub.endpoint}/files/",
        "NANOCHAT_RETRY_SECONDS": "1",
    }


@pytest.fixture
def stage(about: dict[str, str], workspace: Workspace, run_command: Callable[..., Result]) -> Callable[..., Result]:
    def run(*arguments: str, **environment: str) -> Result:
        return run_command("stage", *arguments, workspace=workspace.root, **{**about, **environment})

    return run


@pytest.fixture
def stage_here(
    about: dict[str, str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, str]]:
    """The same in this process: from names to what is said of each."""
    for name, value in about.items():
        monkeypatch.setenv(name, value)

    def run(*names: str, **options: Any) -> dict[str, str]:
        watch = Console(enabled=False).progress
        return {staged.name: staged.note for staged in staging.stage(names, workspace, watch, **options)}

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_data_set_comes_whole_with_a_manifest_and_opens(
    stage: Callable[..., Result], workspace: Workspace
) -> None:
    result = stage("core", *STAGED)
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
    assert manifest["source"] == {"repository": "cais/mmlu", "revision": COMMIT, "requested": "main"}
    for name in STAGED:
        assert len(open_task(name, workspace.task_data).problems("train")) > 0
    assert names(workspace.eval_bundle) == ["core.yaml", "eval_data/a", "manifest.json"]
    items = json.loads(workspace.inventory.read_text())["items"]
    assert set(items) == {"core", *STAGED}
    assert items["mmlu"]["files"] == manifest["files"]
    assert check_inventory(workspace.inventory, checksums=True) == []


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
    stage("gsm8k")
    shutil.copytree(workspace.task_data, tmp_path / "copy", copy_function=shutil.copyfile)
    assert describe_task("gsm8k", tmp_path / "copy") == describe_task("gsm8k", workspace.task_data)


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "set HF_TOKEN"), (404, "check HF_ENDPOINT"), (429, "wait some minutes")]
)
def test_a_refusal_is_one_line_with_what_to_do(
    stage: Callable[..., Result], workspace: Workspace, hub: HubServer, status: int, fix: str
) -> None:
    hub.refuse_with = status
    result = stage("gsm8k")
    assert result.returncode == ExitCode.FAILED
    (line,) = result.stderr.splitlines()
    assert f"openai/gsm8k at main was not downloaded: the server answered {status} — " in line
    assert fix in line
    assert names(workspace.task_data) == [".lock"]


@pytest.mark.parametrize("lose_after", [0, 1, 2])
def test_a_lost_connection_keeps_what_is_whole_and_the_next_attempt_brings_the_rest(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace, hub: HubServer, lose_after: int
) -> None:
    hub.lose_after = lose_after
    with pytest.raises(NanochatError, match=r"was not downloaded: .* cannot be reached"):
        stage_here("gsm8k", workers=1)
    assert not (workspace.task_data / "openai--gsm8k").exists()
    hub.lose_after = None
    hub.requests.clear()
    assert stage_here("gsm8k") == {"gsm8k": "downloaded"}
    assert sum("/resolve/" in line for line in hub.requests) == 2 - max(0, lose_after - 1)
    assert [path.name for path in workspace.task_data.iterdir() if path.is_dir()] == ["openai--gsm8k"]


def test_a_flipped_byte_does_not_become_data(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace, hub: HubServer
) -> None:
    hub.flips = 2
    with pytest.raises(DataError, match="came twice with bytes that do not match its checksum"):
        stage_here("gsm8k", workers=1)
    assert not (workspace.task_data / "openai--gsm8k").exists()


def test_what_fails_does_not_keep_the_rest_from_coming(
    stage: Callable[..., Result], workspace: Workspace, hub: HubServer
) -> None:
    shutil.rmtree(hub.root / "openai")
    (hub.root / "eval_bundle.zip").unlink()
    result = stage("gsm8k", "core", "arc-easy")
    assert result.returncode == ExitCode.FAILED
    (line,) = result.stderr.splitlines()
    assert "openai/gsm8k at main was not downloaded" in line
    assert "the evaluation bundle was not downloaded" in line
    assert len(open_task("arc-easy", workspace.task_data).problems("train")) > 0
    assert set(json.loads(workspace.inventory.read_text())["items"]) == {"arc-easy"}


def test_another_revision_takes_the_place_of_what_was_there_when_it_is_asked_for(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace
) -> None:
    stage_here("gsm8k")
    folder, older = workspace.task_data / "openai--gsm8k", "0" * 40
    source = {"repository": "openai/gsm8k", "revision": older, "requested": "main"}
    write_manifest(folder, "task_data", read_manifest(folder, "task_data", "")["files"], source=source)
    assert stage_here("gsm8k") == {"gsm8k": "was there"}
    assert stage_here("gsm8k", revision=older) == {"gsm8k": "was there"}
    assert stage_here("gsm8k", revision=COMMIT) == {"gsm8k": f"replaces what was there, of commit {older}"}
    assert stage_here("gsm8k", revision=COMMIT) == {"gsm8k": "was there"}


def test_a_file_that_was_cut_is_noticed_by_the_inventory_and_brought_again(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace
) -> None:
    stage_here("gsm8k", "core")
    (workspace.eval_bundle / "core.yaml").unlink()
    path = next(workspace.task_data.glob("openai--gsm8k/main/test-*"))
    path.write_bytes(path.read_bytes()[:-1])
    wrong = check_inventory(workspace.inventory)
    assert [error.fix for error in wrong] == ["nanochat stage core", "nanochat stage gsm8k"]
    assert stage_here("gsm8k", "core") == {"gsm8k": "downloaded", "core": "downloaded"}
    assert check_inventory(workspace.inventory, checksums=True) == []


def test_a_changed_inventory_is_called_damaged(tmp_path: Path) -> None:
    assert check_inventory(tmp_path / "inventory.json") == []
    write_json(tmp_path / "inventory.json", {"kind": "inventory", "items": {"gone": {}}, "fingerprint": "0"})
    (error,) = check_inventory(tmp_path / "inventory.json")
    assert "is damaged — delete it and run: nanochat stage" in str(error)


def test_a_bundle_that_was_unpacked_by_hand_is_kept(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace
) -> None:
    workspace.eval_bundle.mkdir(parents=True)
    (workspace.eval_bundle / "core.yaml").write_text("mine")
    assert stage_here("core") == {"core": "was there"}
    assert names(workspace.eval_bundle) == ["core.yaml"]


def _link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "")
        member = zipfile.ZipInfo("eval_bundle/link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return stream.getvalue()


def _bundle(members: dict[str, str], flip: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return stream.getvalue().replace(flip.encode(), flip.upper().encode(), 1) if flip else stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_bundle({"eval_bundle/../../escaped": "x", "eval_bundle/core.yaml": ""}), "could lead out of"),
        (_link(), "holds a link"),
        (_bundle({"other/core.yaml": ""}), "has no eval_bundle/core.yaml — check NANOCHAT_EVAL_BUNDLE_URL"),
        (_bundle({"eval_bundle/core.yaml": "content"}, flip="content"), "is damaged (Bad CRC-32"),
        (b"<html>not there</html>", "is damaged (File is not a zip file) — run the same command again"),
    ],
    ids=["leads out", "link", "other", "flipped", "page"],
)
def test_an_archive_that_is_not_the_bundle_is_refused(
    stage_here: Callable[..., dict[str, str]], workspace: Workspace, hub: HubServer, content: bytes, message: str
) -> None:
    (hub.root / "eval_bundle.zip").write_bytes(content)
    with pytest.raises(DataError) as refused:
        stage_here("core")
    assert message in str(refused.value)
    assert not workspace.eval_bundle.exists()
    assert names(workspace.root) == ["task_data/.lock"]


def test_vocabularies_come_where_the_tokenizer_is_compared_with_them(
    stage_here: Callable[..., dict[str, str]], hub: HubServer, workspace: Workspace
) -> None:
    ranks = "".join(f"{encoded} {rank}\n" for rank, encoded in enumerate(("YQ==", "Yg==", "YWI="))).encode()
    (hub.root / "tiny.tiktoken").write_bytes(ranks)
    peer = PeerTokenizer("tiny", "https://example.com/tiny.tiktoken", hashlib.sha256(ranks).hexdigest(), r".+")
    assert stage_here("encodings", peers=[peer]) == {"encodings": "downloaded"}
    encoding = load_peer(peer, workspace.encodings)
    assert encoding is not None
    assert encoding.encode_ordinary("ab") == [2]
    assert stage_here("encodings", peers=[peer]) == {"encodings": "was there"}
    (hub.root / "tiny.tiktoken").write_bytes(ranks[::-1])
    shutil.rmtree(workspace.encodings)
    with pytest.raises(DataError, match="tiny came twice with bytes that do not match its checksum"):
        stage_here("encodings", peers=[peer])


def run_config(mid: tuple[str, ...], sft: tuple[str, ...], evaluation: tuple[str, ...] = ()) -> RunConfig:
    return RunConfig(
        "run",
        "existing",
        TokenizerConfig(),
        TrainBaseConfig(),
        TrainMidConfig(tasks=mid),
        TrainSFTConfig(tasks=sft),
        EvalConfig(tasks=evaluation),
    )


def test_what_a_run_reads_is_what_is_staged(tmp_path: Path) -> None:
    config = run_config(("smoltalk:100", "library"), ("gsm8k:x2",))
    everything = ("tokenizer", "base", "mid", "sft", "eval")
    assert staging.names_of_run(config, everything, tmp_path) == ["gsm8k", "smoltalk", "core", "encodings"]
    assert staging.names_of_run(config, ("mid",), tmp_path) == ["smoltalk"]
    assert staging.names_of_run(config, ("corpus", "report"), tmp_path) == []
    examined = run_config(("library",), ("library",), ("mmlu",))
    assert staging.names_of_run(examined, ("eval",), tmp_path) == ["mmlu", "core"]
    with pytest.raises(DataError, match=r"own\.jsonl is not there"):
        staging.names_of_run(run_config(("jsonl=own.jsonl",), ("library",)), ("mid",), tmp_path)


def test_the_command_stages_what_the_flags_of_a_run_name(stage: Callable[..., Result], hub: HubServer) -> None:
    result = stage("--stages", "sft", "--sft.tasks", "gsm8k:10", "arithmetic")
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines() if "(downloaded)" in line] == ["gsm8k"]


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
