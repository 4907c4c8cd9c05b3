"""slurm/submit on a machine without Slurm, and its parts; with a cluster see tests/slurm_cluster."""

import base64
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slurm_scripts import SLURM, call, path_without_slurm, run, write_site

TABLE = "gpu|1-00:00:00|2|gpu:a100:8(S:0-1)|128|up\ngpu|1-00:00:00|1|gpu:v100:4,shard:8|32+|up"
ASK = 'source "$JOB_SCRIPTS/env.sh"; FLAGS=(); USER=me; for name in $KNOWN_SETTINGS; do declare "SITE_$name="; done; '
SHOW = 'printf "%s\\n" ${PROBLEMS[@]+"${PROBLEMS[@]}"}'

# Anything that can be an argument of a program.
ARGUMENTS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4)


def submit(folder: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Call slurm/submit where there is no Slurm, for a site in this folder."""
    if not (folder / "bin").exists():
        path_without_slurm(folder / "bin")
    defaults = {"PATH": str(folder / "bin"), "NANOCHAT_SITE": str(folder / "site.env")}
    return run(SLURM / "submit", *words, cwd=folder, env={**defaults, **env})


def problems(code: str, **env: str) -> str:
    """What the checks called by some code find."""
    return call("submit", ASK + code + "; " + SHOW, env=env).strip()


def check_nodes(*, gpus: int = 8, nodes: int = 1, cores: str = "", gpu_type: str = "") -> tuple[str, str]:
    """What is wrong with a choice of nodes, and the cores that a process gets."""
    chosen = f"JOB_PARTITION=gpu JOB_GPUS={gpus} JOB_NODES={nodes} JOB_CPUS={cores} SITE_GPU_TYPE={gpu_type}"
    code = f'{chosen} SITE_FILE=site.env JOB_TASKS_PER_NODE={max(gpus, 1)}; check_nodes "$TABLE"; echo "$JOB_CPUS"'
    share, _, found = problems(code, TABLE=TABLE).partition("\n")
    return found, share


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "what is to be submitted?"),
        (["sppedrun"], "no kind of job 'sppedrun'"),
        (["speedrun", "--partiton", "gpu"], "no option '--partiton'"),
        (["speedrun", "--depth", "20"], "flags of the trainer come after --"),
        (["speedrun", "--nodes"], "--nodes needs a value"),
        (["speedrun", "--nodes", "0"], "--nodes '0'"),
        (["speedrun", "--gpus", "-1"], "--gpus '-1'"),
        (["speedrun", "--time", "90m"], "--time '90m'"),
        (["speedrun", "--array", "4"], "--array is for"),
        (["command"], "which command?"),
        (["experiment"], "which experiment?"),
    ],
)
def test_a_wrong_call_is_one_line_and_code_2(tmp_path: Path, words: list[str], expected: str) -> None:
    done = run(SLURM / "submit", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert "slurm/submit --help" in done.stderr


def test_help_names_every_option_that_is_taken() -> None:
    patterns = re.findall(r"^ +((?:--[a-z-]+ ?\|? ?)+)\)", (SLURM / "submit").read_text(), re.MULTILINE)
    taken = {option for pattern in patterns for option in pattern.split(" | ")}
    assert {"--site", "--dry-run", "--rank-logs"} <= taken
    shown = set(re.findall(r"^  (--[a-z-]+) ", run(SLURM / "submit", "--help").stdout, re.MULTILINE))
    assert shown == taken


def test_all_that_is_wrong_is_said_at_once_with_what_mends_it(tmp_path: Path) -> None:
    write_site(tmp_path, SITE_IMAGE=tmp_path / "none.sif", SITE_SECRETS=tmp_path / "secrets.env")
    (tmp_path / "secrets.env").write_text("WANDB_API_KEY=0\n")
    (tmp_path / "secrets.env").chmod(0o640)
    done = submit(tmp_path, "speedrun", "--", "--depth", "4", "--run", "other", WANDB_RUN="dummy")
    lines = done.stderr.splitlines()
    assert done.returncode == 3
    assert lines[-1] == "slurm/submit: nothing was submitted"
    assert [line.split("  ")[1] for line in lines[:-1]] == ["image", "secrets", "run name", "run name", "Slurm"]
    assert all(line.startswith("PROBLEM  ") and " — " in line for line in lines[:-1])
    assert f"chmod 600 {tmp_path}/secrets.env" in done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "WANDB_RUN is not set: the job would wait for its GPUs only to end"),
        ("", "WANDB_RUN is empty"),
        (" \t", "WANDB_RUN is empty"),
        ("dummy", "skip midtraining and SFT"),
        ("../up", "not usable as a file name"),
        ("a b", "not usable as a file name"),
        ("-x", "not usable as a file name"),
        ("a" * 129, "not usable as a file name"),
        ("exp-top16.d26_8gpu", None),
        ("a" * 128, None),
    ],
)
def test_a_run_needs_a_name_that_can_name_it(name: str | None, expected: str | None) -> None:
    found = problems("KIND=speedrun; check_run_name", **({} if name is None else {"WANDB_RUN": name}))
    assert (found == "") if expected is None else (expected in found)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("SITE_PARTITON=gpu", "sets SITE_PARTITON, which nothing reads"),
        ("HF_TOKEN=hf_0", "sets HF_TOKEN, which would be written down"),
        ("SITE_MAIL = me", "no NAME=value"),
        ("rm -rf x", "no NAME=value"),
        ("SITE_MAIL='me", "cannot be evaluated"),
        ("SITE_MAIL=me\r", "Windows line ends"),
    ],
)
def test_a_mistake_in_a_site_file_is_named(tmp_path: Path, line: str, expected: str) -> None:
    with write_site(tmp_path).open("a", newline="") as file:
        file.write(line + "\n")
    done = submit(tmp_path, "speedrun", WANDB_RUN="first")
    assert done.returncode == 3
    assert expected in done.stderr
    assert str(tmp_path / "site.env") in done.stderr


def test_a_site_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    done = submit(tmp_path, "speedrun", "--site", "nowhere", WANDB_RUN="first")
    assert done.returncode == 3
    assert "nowhere.env is not there" in done.stderr
    assert "ptolemy.env" in done.stderr


def test_the_folder_of_the_log_is_made(tmp_path: Path) -> None:
    write_site(tmp_path)
    submit(tmp_path, "speedrun", WANDB_RUN="first")
    assert (tmp_path / "scratch/nanochat/runs/first/logs").is_dir()


def test_an_image_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "nanochat.sif"
    image.write_bytes(b"an image")
    digest = "be45fae81d6c5bba4b7c3ffbc8f9d81e2a5d6b9f5e2b0c4c3b5f4d1c7a8e9f00"
    check = f"NANOCHAT_IMAGE={image} SITE_IMAGE_SHA256=%s SITE_FILE=site.env; check_what_is_pinned"
    assert f"not {digest}" in problems(check % digest)
    right = subprocess.run(["sha256sum", image], capture_output=True, text=True, check=True).stdout.split()[0]
    assert problems(check % right) == ""


def test_nodes_with_the_gpus_asked_for_are_found_in_the_table() -> None:
    assert check_nodes(gpus=8, nodes=2) == ("", "16")
    assert check_nodes(gpus=4, nodes=3) == ("", "32")
    assert check_nodes(gpus=4, gpu_type="v100") == ("", "8")
    assert check_nodes(gpus=0, nodes=3) == ("", "128")


def test_nodes_that_are_not_there_are_answered_with_those_that_are() -> None:
    found, _ = check_nodes(gpus=8, gpu_type="h100")
    assert "no node of partition gpu has 8 GPUs of type h100; its nodes: 2 with gpu:a100:8" in found
    assert "--nodes 2" in check_nodes(gpus=8, nodes=3)[0]
    assert "--cpus 16" in check_nodes(gpus=8, cores="17")[0]


@pytest.mark.parametrize(
    ("asked", "site", "expected"),
    [
        ("", "12:00:00", "12:00:00"),
        ("", "2-0", "1-00:00:00"),
        ("", "", "1-00:00:00"),
        ("60", "12:00:00", "60"),
        ("25:00:00", "", "more than the 1-00:00:00 that partition gpu allows"),
        ("2", "", "not more than the 180 s that are kept for the last checkpoint"),
    ],
)
def test_the_time_limit_is_what_was_asked_for_or_what_may_be_had(asked: str, site: str, expected: str) -> None:
    code = f"OPT_TIME={asked} JOB_TIME={asked or site} JOB_PARTITION=gpu SITE_STOP_BEFORE=180 SITE_FILE=site.env; "
    said = problems(code + 'check_time "$TABLE"; echo "$JOB_TIME"', TABLE=TABLE)
    assert expected in said
    assert ("PROBLEM" in said) == (" " in expected)


def write_settings(folder: Path, kind: str, arguments: list[str], gpus: int = 0) -> Path:
    """Have slurm/submit write down a job."""
    chosen = f"JOB_KIND={kind} JOB_LOGS={folder} JOB_GPUS={gpus} JOB_TASKS_PER_NODE=1 JOB_NODES=1 JOB_PARTITION=cpu"
    code = (
        f"{chosen} JOB_TIME=60 JOB_ACCOUNT= SITE_EXPORTS= NANOCHAT_BASE_DIR={folder} NANOCHAT_IMAGE= NANOCHAT_VENV=; "
    )
    words = " ".join(map(shlex.quote, arguments))
    code += f"JOB_ARGUMENTS=({words}); build_sbatch train.sbatch first; write_settings; echo $SETTINGS"
    return Path(call("submit", ASK + code).strip())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARGUMENTS)
def test_the_trainers_arguments_reach_the_job_as_they_were_typed(tmp_path: Path, arguments: list[str]) -> None:
    file = write_settings(tmp_path, "speedrun", arguments)
    read = f'source {file}; printf "%s\\0" "${{JOB_ARGUMENTS[@]}}" | base64'
    assert base64.b64decode(call("env.sh", read)).decode().split("\0")[:-1] == arguments


def test_no_key_is_written_down_or_put_on_a_command_line(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=hf_fromfile\n")
    code = (
        f"SITE_SECRETS={secrets} NANOCHAT_BASE_DIR={tmp_path} SITE_TMP= SITE_NETWORK= SITE_EXPORTS=; set_environment; "
    )
    code += f"NANOCHAT_IMAGE=/a.sif SITE_SCRATCH= SITE_BINDS= NANOCHAT_VENV= JOB_LOGS={tmp_path} JOB_KIND=speedrun; "
    code += (
        "JOB_GPUS=1 JOB_TASKS_PER_NODE=1 JOB_NODES=1 JOB_PARTITION=p JOB_TIME=9 JOB_ACCOUNT= JOB_ARGUMENTS=(speedrun); "
    )
    code += 'build_command 1; build_sbatch train.sbatch r; write_settings; echo "${NANOCHAT[@]}" "${SBATCH[@]}"; '
    said = call("submit", ASK + code + 'cat "$SETTINGS"', env={"WANDB_API_KEY": "fromlogin" * 5})
    assert "sbatch --parsable" in said
    assert "hf_fromfile" not in said
    assert "fromlogin" not in said


def test_resume_takes_up_the_last_training_job_and_what_is_said_now_wins(tmp_path: Path) -> None:
    for kind, arguments in (("speedrun", ["speedrun", "--depth", "4"]), ("prepare", ["data", "verify"])):
        write_settings(tmp_path, kind, arguments)
    recall = f"KIND=resume WANDB_RUN=first NANOCHAT_BASE_DIR={tmp_path} JOB_LOGS={tmp_path}; "
    show = 'echo "$JOB_KIND $JOB_PARTITION $JOB_TIME ${JOB_ARGUMENTS[*]}"'
    assert call("submit", ASK + recall + "choose_arguments; " + show) == "speedrun cpu 60 speedrun --depth 4\n"
    changed = recall + "FLAGS=(--depth 6); choose_arguments; " + show
    assert call("submit", ASK + changed) == "speedrun cpu 60 speedrun --depth 6\n"


def test_there_is_nothing_to_resume_of_a_run_that_was_never_submitted(tmp_path: Path) -> None:
    code = f"KIND=resume WANDB_RUN=first NANOCHAT_BASE_DIR={tmp_path} JOB_LOGS={tmp_path}; choose_arguments"
    assert "WANDB_RUN=first slurm/submit speedrun" in problems(code)


def test_an_experiments_plan_is_read_with_its_difficult_words(tmp_path: Path) -> None:
    plan = '{"name": "x", "arms": [{"arm": "a", "seed": 1, "run": "x-a-s1"}], "prepare": [["data", "it\'s \\"a b\\""]]}'
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "nanochat").write_text(f"#!/bin/bash\ncat {tmp_path / 'plan.json'}\n")
    (bin_folder / "nanochat").chmod(0o755)
    (bin_folder / "python").symlink_to("/usr/bin/python3")
    (tmp_path / "plan.json").write_text(plan)
    code = f"FILE=x.toml NANOCHAT=({bin_folder}/nanochat); read_plan; "
    code += 'eval "words=($(sed -n "s/^prepare //p" <<<"$PLAN"))"; printf "%s\\n" "$EXPERIMENT" "${words[@]}"'
    assert call("submit", ASK + code).splitlines() == ["x", "data", 'it\'s "a b"']


def test_gpus_are_not_looked_for_where_the_trainer_uses_cpus(tmp_path: Path) -> None:
    for arguments, expected in ((["speedrun", "--device", "cpu"], 0), (["speedrun", "--device", "cuda"], 2)):
        file = write_settings(tmp_path, "speedrun", arguments, gpus=2)
        assert f"\nJOB_VISIBLE_GPUS={expected}\n" in file.read_text()
