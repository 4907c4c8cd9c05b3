"""The image keeps its word under real Apptainer: read-only, offline, as any user, whatever the host looks like.

`nox -s image` builds the image, names it in NANOCHAT_IMAGE and runs these. Only pytest is needed where they run.
"""

import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs/how-to/build-the-image.md"
IMAGE = os.environ.get("NANOCHAT_IMAGE", "")
# Training at toy size, a folder of text given: what `apptainer test` does.
SELFTEST = runpy.run_path(str(ROOT / "container/selftest.py"))
BASE_ONLY: list[str] = SELFTEST["TRAINING"]
COMPILED = [flag if flag != "off" else "on" for flag in BASE_ONLY]
WHOLE = [flag for flag in BASE_ONLY if flag not in ("--stages", "corpus", "tokenizer", "tokenize", "base")]
WHOLE += shlex.split(
    """--mid.tasks arithmetic:200 identity --mid.num-steps 4 --mid.lanes 4 --mid.pool-size 8 --mid.eval-tokens 1024
    --sft.tasks arithmetic:100 --sft.num-steps 4 --sft.lanes 4 --sft.pool-size 8 --sft.eval-tokens 1024
    --sft.batch-fraction 1 --eval.tasks arithmetic --eval.max-problems 8 --eval.max-new-tokens 8"""
)


def apptainer(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Apptainer on the image; `env` adds to the environment. Paths of flags and commands are as on the host."""
    assert IMAGE, "NANOCHAT_IMAGE names no image; run: nox -s image"
    env = os.environ | options.pop("env", {})
    options = {"capture_output": True, "text": True, "check": False, "stdin": subprocess.DEVNULL} | options
    return subprocess.run(["apptainer", "--silent", *map(str, arguments)], env=env, **options)


def passed(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with texts that anybody may write to, whoever Apptainer runs as; below pytest's own nobody else may."""
    with tempfile.TemporaryDirectory(prefix="nanochat-scratch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        lines = [
            json.dumps({"text": f"{number} plus {number % 7} is {number + number % 7}. " * 3}) for number in range(400)
        ]
        (folder / "texts/texts.jsonl").write_text("\n".join(lines) + "\n")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        yield folder


def workspace_at(scratch: Path) -> dict[str, str]:
    return {"NANOCHAT_BASE_DIR": str(scratch / "workspace")}


def train(scratch: Path, *flags: str | Path, training: list[str] = BASE_ONLY, **options: Any) -> str:
    """Train with Apptainer's `flags`, from text to a checkpoint in `scratch`."""
    env = workspace_at(scratch) | options.pop("env", {})
    command = ("run", *flags, "--bind", scratch, IMAGE, *training, "--data", scratch / "texts")
    printed = passed(apptainer(*command, env=env, **options))
    assert list(scratch.glob("workspace/base_checkpoints/*/step_000008/manifest.json")), printed
    return printed


# What the image is.


def test_the_manifest_names_this_checkout_and_its_lock() -> None:
    manifest = json.loads(passed(apptainer("run", IMAGE, "manifest")))
    lock = ROOT / f"container/requirements-{manifest['variant']}.lock"
    assert manifest["lock"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    source_digest = runpy.run_path(str(ROOT / "container/manifest.py"))["source_digest"]
    assert manifest["source"] == source_digest(ROOT / "src/nanochat")
    assert any(entry.startswith("torch==2.13.0") for entry in manifest["python"])
    assert any(entry.startswith("gcc=") for entry in manifest["debian"])


def test_the_bill_of_materials_lists_what_the_manifest_lists_with_licences() -> None:
    manifest = json.loads(passed(apptainer("run", IMAGE, "manifest")))
    bill = json.loads(passed(apptainer("run", IMAGE, "sbom")))
    listed = {f"{found['name']}=={found['version']}" for found in bill["components"] if "pypi" in found["purl"]}
    assert listed == set(manifest["python"])
    assert len(bill["components"]) == len(manifest["python"]) + len(manifest["debian"])
    assert "numpy" in passed(apptainer("run", IMAGE, "licences"))


def test_labels_and_version_name_the_commit() -> None:
    manifest = json.loads(passed(apptainer("run", IMAGE, "manifest")))
    labels = json.loads(passed(apptainer("inspect", "--json", IMAGE)))["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.revision"] == manifest["revision"]
    assert labels["nanochat.variant"] == manifest["variant"]
    version = passed(apptainer("run", IMAGE, "--version"))
    assert manifest["revision"][:7] in version
    assert manifest["fingerprint"][:16] in version


def test_the_byte_code_of_every_module_is_in_the_image() -> None:
    for module in ("torch", "torch._inductor.select_algorithm", "nanochat.cli"):
        shown = passed(apptainer("exec", IMAGE, "python", "-c", f"import {module} as m; print(m.__cached__)"))
        passed(apptainer("exec", IMAGE, "test", "-s", shown.strip()))


def test_nothing_of_the_build_environment_is_in_the_image() -> None:
    canary = os.environ.get("NANOCHAT_IMAGE_CANARY")
    if not canary:
        pytest.skip("nox -s image puts a secret into the environment of the build")
    assert canary not in passed(apptainer("inspect", "--all", IMAGE))
    # grep finds nothing: 1. Files that only root can read hold what Debian puts there.
    found = apptainer(
        "exec", IMAGE, "grep", "-rlsF", canary, "/opt", "/etc", "/root", "/home", "/var", "/.singularity.d", "/usr"
    )
    assert found.stdout == ""


# What it does.


@pytest.mark.timeout(3600)
def test_without_arguments_it_trains_the_demo_writes_its_report_and_answers(scratch: Path) -> None:
    # OMP_NUM_THREADS: as a user would have it, whatever the other tests set.
    env = workspace_at(scratch) | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    printed = passed(apptainer("run", "--bind", scratch, IMAGE, env=env))
    assert "[8/8] report done" in printed
    report = (scratch / "workspace/demo/report/report.md").read_text()
    assert all(f" {stage} |" in report for stage in ("BASE", "MID", "SFT"))
    question, answer = printed[printed.index("\nyou: ") :].strip().split("\n")[:2]
    assert question == "you: What does `os.path.join` do?"
    assert len(answer.removeprefix("nanochat: ").split()) > 2


def test_help_says_how_to_use_the_image_and_lists_the_commands() -> None:
    printed = passed(apptainer("run", IMAGE, "help"))
    assert "apptainer run --nv nanochat.sif" in printed
    assert "train base" in printed


def test_a_whole_run_ends_with_a_report(scratch: Path) -> None:
    train(scratch, training=WHOLE)
    report = (scratch / "workspace/report/report.md").read_text()
    revision = json.loads(passed(apptainer("run", IMAGE, "manifest")))["revision"]
    assert revision.removesuffix("-dirty")[:8] in report
    assert list(scratch.glob("workspace/chatsft_checkpoints/*/step_000004/manifest.json"))


def test_torchrun_starts_several_ranks(scratch: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "nanochat", "--", *BASE_ONLY]
    train(scratch, training=launcher)


def test_compiled_code_goes_to_the_workspace_and_is_found_again(scratch: Path) -> None:
    train(scratch, training=COMPILED)
    kept = set(scratch.glob("workspace/cache/inductor/**/*.so"))
    assert kept
    shutil.rmtree(scratch / "workspace/base_checkpoints")
    train(scratch, training=COMPILED)
    assert set(scratch.glob("workspace/cache/inductor/**/*.so")) == kept


@pytest.mark.parametrize("hidden", ["--env=CXX=/nonexistent/g++", "/usr/include/python3.11", "/usr/include/c++"])
def test_compiling_needs_the_compiler_and_the_headers_that_the_image_holds(scratch: Path, hidden: str) -> None:
    (scratch / "empty").mkdir()
    flags = [hidden] if hidden.startswith("--") else ["--bind", f"{scratch / 'empty'}:{hidden}"]
    flags += ["--bind", scratch, "--env", f"TMPDIR={scratch}"]
    program = "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(8))"
    failed = apptainer("exec", *flags, IMAGE, "python", "-c", program)
    assert failed.returncode != 0
    assert "C++ compile" in failed.stderr


def test_a_signed_image_of_which_a_byte_changed_is_refused(scratch: Path) -> None:
    copy, keys = scratch / "signed.sif", {"APPTAINER_KEYSDIR": str(scratch / "keys")}
    shutil.copyfile(IMAGE, copy)
    copy.chmod(0o777)
    person = ("--name=test", "--email=test@example.org", "--comment=", "--password=", "--push=false")
    passed(apptainer("key", "newpair", *person, env=keys))
    passed(apptainer("sign", "--keyidx=0", copy, env=keys))
    passed(apptainer("verify", "--local", copy, env=keys))
    with copy.open("r+b") as file:
        file.seek(copy.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert apptainer("verify", "--local", copy, env=keys).returncode != 0


def test_the_image_cannot_be_changed() -> None:
    tried = apptainer("exec", IMAGE, "touch", "/opt/nanochat/venv/new")
    assert tried.returncode != 0
    assert "Read-only file system" in tried.stderr or "Permission denied" in tried.stderr


# Where it runs.


def test_it_needs_no_network(scratch: Path) -> None:
    interfaces = passed(apptainer("exec", "--net", "--network=none", IMAGE, "cat", "/proc/net/dev"))
    assert "eth" not in interfaces
    train(scratch, "--net", "--network=none")


@pytest.mark.parametrize("kind", ["empty", "missing", "unwritable"])
def test_it_needs_no_home(scratch: Path, kind: str) -> None:
    home = scratch / "home"
    home.mkdir()
    home.chmod(0o777 if kind == "empty" else 0o555)
    train(scratch, *(["--no-home"] if kind == "missing" else ["--home", home]))
    # Where nothing may be written nothing was tried to the end, where it may nothing was left.
    assert list(home.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run it as somebody else")
def test_it_runs_as_any_user(scratch: Path) -> None:
    assert passed(apptainer("exec", IMAGE, "id", "-u", env={"APPTAINER_USER": "nobody"})).strip() == "65534"
    train(scratch, env={"APPTAINER_USER": "nobody"}, cwd="/")


def test_what_the_host_sets_does_not_reach_in(scratch: Path) -> None:
    home, here = scratch / "home", scratch / "here"
    packages = home / ".local/lib/python3.11/site-packages"
    for folder in (packages, here):
        for module in ("torch", "numpy", "nanochat", "usercustomize", "random"):
            (folder / module).mkdir(parents=True)
            (folder / module / "__init__.py").write_text(f"raise SystemExit('the broken {module} of the host')")
    (packages / "broken.pth").write_text("import sys; sys.exit('the broken .pth of the host')\n")
    hostile = {
        "PYTHONPATH": str(packages),
        "PYTHONHOME": "/nonexistent",
        "LD_PRELOAD": "/nonexistent/libevil.so",
        "LD_LIBRARY_PATH": "/nonexistent",
        "CC": "icc",
        "CXX": "icpc",
        "WANDB_MODE": "online",
        "LC_ALL": "xx_XX.UTF-8",
    }
    for path in (home, here):
        path.chmod(0o777)
    asks_wandb = [flag if flag != "offline" else "auto" for flag in COMPILED]
    train(scratch, "--home", home, "--pwd", here, env=hostile, training=asks_wandb)


def test_under_containall_compiling_needs_more_room_than_apptainer_gives(scratch: Path) -> None:
    inside = [f"{name}={value}" for name, value in workspace_at(scratch).items()]
    flags = ("--containall", "--bind", scratch, "--env", *inside)
    failed = apptainer("run", *flags, IMAGE, *COMPILED, "--data", scratch / "texts")
    # If this passes, Apptainer's room grew or torch's precompiled header shrank: the documentation gets shorter.
    assert failed.returncode != 0
    assert "No space left on device" in failed.stdout + failed.stderr


def test_under_containall_with_a_work_folder_its_own_test_passes(scratch: Path) -> None:
    (scratch / "work").mkdir()
    (scratch / "work").chmod(0o777)
    printed = passed(apptainer("test", "--containall", "--workdir", scratch / "work", IMAGE))
    assert "compiled code runs" in printed
    assert "a toy model trained" in printed


# What docs/how-to/build-the-image.md tells to type.

# Of its commands those that are not run below, each with what stands for it or why it cannot be tried here.
NOT_RUN = {
    "pip install nox": "what runs this has it",
    "nox -s image -- --variant cuda --output nanochat.sif": "needs a registry of images",
    "apptainer run --nv nanochat.sif": "test_without_arguments_…, without a GPU",
    "python container/build.py --variant cuda": "needs a registry of images",
    "sudo container/setup-apptainer.sh": "`nox -s image -- --setup`",
    "nox -s image -- --variant cpu --bootstrap debootstrap": "what runs this",
    "export APPTAINER_TMPDIR=/local/$USER": "a folder of the reader's cluster",
    "python container/build.py": "needs a registry of images",
    "pip download --only-binary :all: --no-deps --require-hashes --dest wheels "
    "-r container/requirements-cuda.lock": "3 GB; below for the one wheel that a rebuild takes",
    "nox -s lock -- cu126": "the page itself says that nobody has tested it",
    "nox -s image -- --variant cu126": "the same",
    "nox -s lock": "what has been released since would change the checkout",
    "nox -s lock -- --check": "what has been released since would fail it",
    "nox -s image -- --reproduce": "takes two builds; run by hand before a release",
}


def commands_of(page: Path) -> list[str]:
    """The commands in a page's shell blocks, each on one line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [" ".join(line.split()) for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def test_every_command_of_the_how_to_works_or_is_known_not_to_be_tried(scratch: Path) -> None:
    commands = commands_of(HOW_TO)
    assert set(NOT_RUN) <= set(commands), "the page has changed: bring the list up to date"
    variant = json.loads(passed(apptainer("run", IMAGE, "manifest")))["variant"]
    setuptools = re.search(
        r"^setuptools==\S+", (ROOT / f"container/requirements-{variant}.lock").read_text(), re.MULTILINE
    )
    assert setuptools
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch / "wheels"]
    subprocess.run([*download, setuptools[0]], check=True)
    for name in ("nanochat.sif", "old.sif"):
        shutil.copyfile(IMAGE, scratch / name)
    (scratch / "container").symlink_to(ROOT / "container")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "APPTAINER_KEYSDIR": str(scratch / "keys")}
    # A person answers questions; and the image at hand may be the other variant.
    spoken = {
        "key newpair": "key newpair --name=me --email=me@example.org --comment= --password= --push=false",
        "build.py --bootstrap": f"build.py --variant {variant} --bootstrap",
    }
    for command in [command for command in commands if command not in NOT_RUN]:
        for brief, whole in spoken.items():
            command = command.replace(brief, whole)
        for file in (*scratch.glob("*.sif"), scratch / "wheels"):
            # Whoever Apptainer runs as signs it, too.
            file.chmod(0o777)
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
