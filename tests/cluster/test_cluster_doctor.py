"""The doctor: says OK of a good machine, and of a bad one what is wrong and what mends it."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from nanochat.cluster import doctor
from nanochat.cluster.doctor import (
    Gpu,
    binds,
    check_attention,
    check_bfloat16,
    check_compiler,
    check_cores,
    check_expected,
    check_gpus,
    check_home,
    check_host_variables,
    check_imports,
    check_packages,
    check_shadowing,
    check_tf32,
    gpus_in,
    has_kernels,
    installed_packages,
    required_packages,
)
from nanochat.cluster.findings import Finding, check_caches, check_folder, check_wandb, looked_at, table
from nanochat.tracking.console import format_bytes
from nanochat.workspace import Workspace

H200 = Gpu("NVIDIA H200", "580.65.06", "9.0")
A100 = Gpu("NVIDIA A100", "535.104.05", "8.0")
V100 = Gpu("Tesla V100", "580.65.06", "7.0")
ON_H200: dict[str, Any] = {
    "gpus": [H200, H200],
    "torch_cuda": "13.0",
    "torch_sees": 2,
    "architectures": ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"],
    "has_driver": True,
    "in_container": False,
    "hidden": False,
}
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("different", "state", "said"),
    [
        ({}, "OK", "2 × NVIDIA H200, driver 580.65.06"),
        ({"gpus": [], "torch_sees": 0, "has_driver": False}, "OK", "the CPU"),
        ({"gpus": [], "torch_sees": 3, "has_driver": False}, "OK", "3, as torch sees them"),
        ({"gpus": [], "torch_sees": 0, "in_container": True}, "PROBLEM", "--nv"),
        ({"gpus": [], "torch_sees": 0}, "PROBLEM", "ask Slurm"),
        ({"gpus": [], "torch_sees": 0, "torch_cuda": None}, "note", "no GPU is seen"),
        ({"torch_cuda": None, "torch_sees": 0}, "PROBLEM", "built for the CPU"),
        (
            {"gpus": [A100], "torch_sees": 0},
            "PROBLEM",
            "CUDA 13.0 needs 580 or newer",
        ),
        ({"torch_sees": 0}, "PROBLEM", "torch can use none"),
        ({"gpus": [V100], "torch_sees": 1}, "PROBLEM", "no kernels for Tesla V100"),
        ({"hidden": True, "torch_sees": 0}, "note", "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_problem_with_its_cause(
    different: dict[str, Any], state: str, said: str
) -> None:
    finding = check_gpus(**{**ON_H200, **different})
    assert finding.state == state
    assert said in f"{finding.text} — {finding.fix}"


@pytest.mark.parametrize(
    ("expect_gpus", "expect_driver", "visible", "state", "said"),
    [
        (2, None, 2, "OK", "2, as expected, driver 580.65.06"),
        (8, None, 2, "PROBLEM", "2 can be used, 8 were expected; nvidia-smi lists 2"),
        (1, None, 2, "PROBLEM", "2 can be used, 1 were expected"),
        (None, "580", 2, "OK", "as expected"),
        (2, "580.65.06", 2, "OK", "as expected"),
        (2, "580.65.7", 2, "PROBLEM", "driver 580.65.06, 580.65.7 or newer was expected"),
        (2, "595", 2, "PROBLEM", "595 or newer"),
    ],
)
def test_a_node_with_other_gpus_than_the_job_asked_for_is_a_problem(
    expect_gpus: int | None, expect_driver: str | None, visible: int, state: str, said: str
) -> None:
    finding = check_expected(expect_gpus, expect_driver, visible, [H200, H200])
    assert (finding.state, said in finding.text) == (state, True), finding.text
    assert bool(finding.fix) == (state == "PROBLEM")


def test_no_gpu_is_as_expected_where_none_was_and_no_driver_is_never_new_enough() -> None:
    assert check_expected(0, None, 0, []).state == "OK"
    assert check_expected(None, "1", 0, []).state == "PROBLEM"


def test_gpus_are_read_from_what_the_driver_prints_and_errors_are_not_gpus() -> None:
    assert gpus_in("NVIDIA H200, 580.65.06, 9.0\nNVIDIA H200, 580.65.06, 9.0\n") == [H200, H200]
    assert gpus_in("NVIDIA, with a comma, 580.65.06, 9.0") == [Gpu("NVIDIA, with a comma", "580.65.06", "9.0")]
    assert gpus_in("No devices were found\n") == gpus_in("") == []


@given(st.integers(5, 12), st.integers(0, 9), st.integers(5, 12), st.integers(0, 9))
def test_kernels_run_on_later_minor_versions_and_portable_ones_on_all_later(
    major: int, minor: int, built_major: int, built_minor: int
) -> None:
    gpu, built = f"{major}.{minor}", f"{built_major}{built_minor}"
    assert has_kernels(gpu, [f"sm_{built}"]) == (major == built_major and minor >= built_minor)
    assert has_kernels(gpu, [f"compute_{built}"]) == ((major, minor) >= (built_major, built_minor))
    assert has_kernels("[N/A]", [f"sm_{built}"])


def test_packages_are_held_to_the_ranges_and_an_image_to_the_exact_versions(tmp_path: Path) -> None:
    required = required_packages({})
    assert {"python", "torch", "rustbpe"} <= {each.name for each in required}
    assert "pytest" not in {each.name for each in required}
    installed = installed_packages()
    assert check_packages(required, installed, in_image=False).state == "OK"
    old = check_packages(required, {**installed, "torch": "2.5.0"}, in_image=False)
    assert old.state == "PROBLEM"
    assert "torch 2.5.0, not <2.16,>=2.11" in old.text
    exact = required_packages({"python": ["torch==2.13.0+cpu", "Numpy_X==1.0"]})
    assert check_packages(exact, {"torch": "2.13.0+cpu", "numpy-x": "1.0"}, in_image=True).state == "OK"
    other = check_packages(exact, {"torch": "2.13.1+cpu"}, in_image=True)
    assert "torch 2.13.1+cpu, not ==2.13.0+cpu; Numpy_X is missing" in other.text
    assert "PYTHONNOUSERSITE" in other.fix


def test_the_fix_for_packages_is_a_command_that_asks_for_what_is_required() -> None:
    finding = check_packages([Requirement("torch>=2.11,<2.16"), Requirement("rustbpe")], {}, in_image=False)
    assert finding.fix == "pip install 'torch<2.16,>=2.11' rustbpe"


def test_a_folder_that_hides_packages_is_found_and_what_comes_after_them_is_not(tmp_path: Path) -> None:
    own, other, library = tmp_path / "own", tmp_path / "other", tmp_path / "library"
    for folder in (own, other, library):
        (folder / "torch").mkdir(parents=True)
        (folder / "torch" / "__init__.py").touch()
        (folder / "psutil.py").touch()
    (own / "only_here.py").touch()
    finding = check_shadowing([str(library), str(other), str(own)], own, [library])
    assert (finding.state, finding.text) == ("PROBLEM", f"{other} hides this environment's psutil, torch")
    assert check_shadowing([str(library), str(own), str(other)], own, [library]).state == "OK"
    assert check_shadowing([str(tmp_path / "missing"), str(own)], own, []).state == "OK"


def test_a_package_that_does_not_load_is_named_with_its_file_and_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken_package.py"
    broken.write_text("raise OSError('libfoo.so.1: cannot open\\nshared object file')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    loaded, wrong, missing = check_imports(["psutil", "broken_package", "no_such_package"], in_image=False)
    assert loaded == Finding("imports", "psutil load")
    assert f"({broken}) does not load: OSError: libfoo.so.1: cannot open shared object file" in wrong.text
    assert (missing.state, missing.fix) == ("PROBLEM", "pip install --force-reinstall no_such_package")
    # An image cannot be mended with pip.
    assert "PYTHONNOUSERSITE" in check_imports(["no_such_package"], in_image=True)[0].fix


def test_variables_that_bring_other_code_in_are_noted() -> None:
    finding = check_host_variables({"PYTHONPATH": "", "LD_PRELOAD": "/x.so"})
    assert (finding.state, finding.text, finding.fix) == (
        "note",
        "LD_PRELOAD=/x.so",
        "if anything fails: unset LD_PRELOAD",
    )
    assert check_host_variables({"PYTHONPATH": ""}).state == "OK"


def test_a_home_that_is_not_there_is_noted(tmp_path: Path) -> None:
    assert check_home({"HOME": str(tmp_path)}) == Finding("home", str(tmp_path))
    for environment in ({}, {"HOME": ""}, {"HOME": "/no/such/home"}):
        assert check_home(environment).state == "note"


def test_a_folder_is_judged_by_its_nearest_parent_and_by_its_room(tmp_path: Path) -> None:
    new = tmp_path / "not" / "yet"
    assert check_folder("cache", new, "fix").state == "OK"
    assert "not made yet" in check_folder("cache", new, "fix").text
    assert not new.parent.exists()
    free = format_bytes(shutil.disk_usage(tmp_path).free)
    little = f"{tmp_path}: {free} free, too little for the {format_bytes(2**60)} that may be needed"
    assert check_folder("cache", tmp_path, "fix", enough=2**60) == Finding("cache", little, "PROBLEM", "fix")
    assert check_folder("cache", tmp_path, "fix", at_ease=2**60).state == "note"
    (tmp_path / "file").touch()
    wrong = check_folder("cache", tmp_path / "file" / "below", "fix", unusable="note")
    assert (wrong.state, wrong.fix) == ("note", "fix")
    assert "is not a folder you may write to" in wrong.text


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_that_may_not_be_written_to_or_entered_is_a_problem(tmp_path: Path, mode: int) -> None:
    closed = tmp_path / "closed"
    (closed / "inside").mkdir(parents=True)
    closed.chmod(mode)
    try:
        assert check_folder("cache", closed / "new" / "folder", "fix").state == "PROBLEM"
    finally:
        closed.chmod(0o700)


def test_caches_go_to_the_workspace_unless_a_variable_names_a_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "file" / "x"), "HF_HOME": str(tmp_path / "file" / "x")}
    found = {finding.subject: finding for finding in check_caches(environment, Workspace(tmp_path / "work"))}
    assert f"{tmp_path}/work/cache/inductor:" in found["TORCHINDUCTOR_CACHE_DIR"].text
    assert f"{tmp_path}/work/wandb:" in found["WANDB_DIR"].text
    # Without the one, torch.compile fails; without the other only a download does.
    assert (found["TRITON_CACHE_DIR"].state, found["HF_HOME"].state) == ("PROBLEM", "note")


@pytest.mark.parametrize(
    ("environment", "stored", "state", "said"),
    [
        ({}, None, "OK", "offline, no key"),
        ({"WANDB_MODE": "dryrun"}, "api.wandb.ai", "OK", "offline, key in"),
        ({}, "api.wandb.ai", "OK", "online where it answers, key in"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, None, "OK", "online, key in WANDB_API_KEY"),
        ({"WANDB_MODE": "online"}, None, "PROBLEM", "wandb login"),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": "https://own.example"}, "api.wandb.ai", "PROBLEM", "no key"),
        ({"WANDB_MODE": "online", "WANDB_BASE_URL": "https://own.example"}, "own.example", "OK", "online"),
        ({"WANDB_MODE": "of"}, None, "PROBLEM", "is not a mode"),
        ({"WANDB_API_KEY": KEY[:20]}, None, "PROBLEM", "has 20 characters"),
        ({"WANDB_API_KEY": f"{KEY}\n"}, None, "PROBLEM", "copy it again"),
        ({"WANDB_API_KEY": KEY[:20], "WANDB_MODE": "disabled"}, None, "OK", "disabled"),
    ],
)
def test_wandb_is_fine_offline_and_needs_a_key_online_which_is_never_shown(
    environment: dict[str, str], stored: str | None, state: str, said: str, tmp_path: Path
) -> None:
    if stored:
        (tmp_path / ".netrc").write_text(f"machine {stored} login user password {KEY}\n", encoding="utf-8")
    (finding,) = looked_at("W&B", lambda: check_wandb({"HOME": str(tmp_path), **environment}))
    assert finding.state == state
    assert said in f"{finding.text} — {finding.fix}"
    assert KEY[:8] not in repr(finding)


def test_a_key_in_a_file_that_others_can_read_is_noted(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={KEY}\n", encoding="utf-8")
    (tmp_path / ".env").chmod(0o644)
    finding = check_wandb({"HOME": str(tmp_path), "NANOCHAT_BASE_DIR": str(tmp_path)})
    assert (finding.state, finding.fix) == ("note", f"chmod 600 {tmp_path}/.env")


def test_a_compiler_is_tried_and_not_only_looked_for(tmp_path: Path) -> None:
    missing = check_compiler("no-such-compiler", "/usr/include", needed=True)
    assert (missing.state, "--compile off" in missing.fix) == ("PROBLEM", True)
    assert check_compiler("no-such-compiler", "/usr/include", needed=False).state == "note"
    stand_in = tmp_path / "c++"
    stand_in.write_text(
        "#!/bin/sh\necho '<stdin>:2: fatal error: Python.h: no such file' >&2\nexit 1\n", encoding="utf-8"
    )
    stand_in.chmod(0o755)
    finding = check_compiler(str(stand_in), str(tmp_path), needed=True)
    assert (finding.state, "fatal error: Python.h" in finding.text) == ("PROBLEM", True)


def test_tf32_cores_and_bfloat16_are_told() -> None:
    assert check_tf32(None, "highest").state == "OK"
    assert check_tf32("torch.backends.fp32_precision='tf32'", "").state == "PROBLEM"
    assert check_cores(1, 64, None).state == "note"
    assert check_cores(1, 1, None).state == "OK"
    assert check_cores(8, 64, "8") == Finding("cores", "8 of 64 usable, OMP_NUM_THREADS=8")
    assert check_bfloat16(True, on_gpu=False).state == "OK"
    assert check_bfloat16(False, on_gpu=False).state == "note"
    assert check_bfloat16(False, on_gpu=True).state == "OK"


def test_missing_attention_kernels_are_noted_where_a_gpu_could_use_them() -> None:
    missing = {"fa3": False, "fa4": False}
    assert check_attention(missing, on_gpu=False).state == "OK"
    assert check_attention(missing, on_gpu=True).state == "note"
    found = check_attention({**missing, "fa4": True}, on_gpu=True)
    assert (found.state, found.text) == ("OK", "fa4, varlen, sdpa to choose from")


def test_binds_are_the_hosts_folders_without_what_every_container_has() -> None:
    mounts = r"""
100 99 0:50 / / ro,nosuid,nodev,relatime - fuse.squashfuse_ll squashfuse ro
101 100 0:22 / /proc rw - proc proc rw
102 100 8:1 /etc/hosts /etc/hosts rw,nosuid - ext4 /dev/sda1 rw
103 100 8:1 /home/me /home/me rw,nosuid,nodev master:1 - ext4 /dev/sda1 rw
104 100 0:99 / /my\040scratch ro,relatime - lustre server:/x rw
105 100 0:24 / /dev/shm rw - tmpfs tmpfs rw
106 100 8:1 /processed /processed rw - ext4 /dev/sda1 rw
""".strip()
    assert binds(mounts) == ["/home/me (rw, ext4)", "/my scratch (ro, lustre)", "/processed (rw, ext4)"]


def test_the_table_is_aligned_and_gives_each_its_fix() -> None:
    lines = table([Finding("a", "fine"), Finding("longer", "bad", "PROBLEM", "mend it")]).splitlines()
    assert lines == ["OK       a       fine", "PROBLEM  longer  bad — mend it"]


Run = Callable[..., "Any"]


def lines_of(output: str) -> dict[str, tuple[str, str]]:
    """What the command says of each subject, as state and text."""
    rows = re.findall(r"^(OK|note|PROBLEM) +(.*?)  +(.*)$", output, re.MULTILINE)
    return {subject: (state, text) for state, subject, text in rows}


HEALTHY = {"PYTHONPATH": "", "LD_PRELOAD": "", "WANDB_MODE": "", "WANDB_API_KEY": "", "CUDA_VISIBLE_DEVICES": ""}


def test_a_healthy_machine_gets_no_problem_and_nothing_is_written(run_command: Run, tmp_path: Path) -> None:
    result = run_command("doctor", **HEALTHY)
    said = lines_of(result.stdout)
    assert result.returncode == (3 if "PROBLEM" in result.stdout else 0)
    for subject in ("container", "packages", "imports", "torch", "TF32", "temporary files", "NANOCHAT_BASE_DIR", "W&B"):
        assert said[subject][0] == "OK", result.stdout
    assert result.stdout.startswith("nanochat ")
    assert not (tmp_path / "workspace").exists()


def test_a_hostile_environment_is_told_and_does_not_stop_the_rest(run_command: Run, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "rustbpe.py").write_text("raise ImportError('of another Python')", encoding="utf-8")
    (hostile / "sitecustomize.py").write_text(
        "import torch\ntorch.backends.cuda.matmul.fp32_precision = 'tf32'\n", encoding="utf-8"
    )
    (tmp_path / "file").touch()
    variables = {
        "PYTHONPATH": str(hostile),
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "secret",
        "TRITON_CACHE_DIR": str(tmp_path / "file" / "x"),
        "CXX": "no-such-compiler",
        "APPTAINER_CONTAINER": "/images/nanochat.sif",
        "HOME": "/no/such/home",
        "XDG_CACHE_HOME": "",
    }
    result = run_command("doctor", **{**HEALTHY, **variables})
    said = lines_of(result.stdout)
    assert result.returncode == 3
    problems = {subject for subject, (state, _) in said.items() if state == "PROBLEM"}
    assert {"import path", "imports", "TF32", "TRITON_CACHE_DIR", "W&B"} <= problems
    assert f"{hostile / 'sitecustomize.py'}:2" in said["TF32"][1]
    assert said["container"][1] == "/images/nanochat.sif"
    assert said["home"][0] == said["host variables"][0] == "note"
    assert "secret" not in result.stdout + result.stderr
    assert re.fullmatch(r"nanochat: \d+ of \d+ findings are problems — .*\n", result.stderr)


def test_where_torch_does_not_load_the_rest_is_still_told(run_command: Run, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')", encoding="utf-8")
    result = run_command("doctor", **{**HEALTHY, "PYTHONPATH": str(tmp_path), "NANOCHAT_BASE_DIR": ""})
    said = lines_of(result.stdout)
    assert result.returncode == 3
    assert "libcudart.so.13" in said["imports"][1]
    assert "is set but empty" in said["NANOCHAT_BASE_DIR"][1]
    assert "W&B" in said


def test_a_small_folder_for_temporary_files_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TEMPORARY_BYTES", 2**60)
    finding = doctor.check_temporary_folder()
    assert (finding.state, "--workdir" in finding.fix) == ("PROBLEM", True)
