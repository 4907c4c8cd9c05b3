"""One process of a step: who it is, and what is left of it when it has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_scripts import PATH, SLURM

# A trainer as the batch scripts know one: it notes the signal, finishes its step, and ends with 75.
TRAINER = """
import signal, sys, time
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
print("ready", flush=True)
while not stopped:
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(75)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(folder: Path, *words: str, rank: int = 0, **more: str) -> "subprocess.Popen[str]":
    variables = {"SLURM_PROCID": rank, "SLURM_NTASKS": 4, "SLURM_LOCALID": rank % 2, "NANOCHAT_TASKS_PER_NODE": 2}
    return subprocess.Popen(
        ["bash", str(SLURM / "task.sh"), *words],
        env={
            **{name: str(value) for name, value in variables.items()},
            "PATH": PATH,
            "NANOCHAT_JOB_FOLDER": str(folder),
            "TMPDIR": str(folder.parent / "own disk" / "7"),
            **more,
        },
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_process_knows_which_of_how_many_it_is(tmp_path: Path) -> None:
    code, said = finish(start(tmp_path, "bash", "-c", "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE", rank=3))
    assert (code, said.split()) == (0, ["3", "4", "1", "2"])


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 1),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "1000000"}, CORES),
        ({"SLURM_CPUS_PER_TASK": "1000000", "OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_a_process_computes_on_its_share_of_the_cores_it_may_use_unless_told(
    tmp_path: Path, variables: dict[str, str], expected: int
) -> None:
    said = finish(start(tmp_path, "bash", "-c", "echo $OMP_NUM_THREADS", **variables))
    assert said == (0, f"{expected}\n")


def test_arguments_arrive_as_they_were_given(tmp_path: Path) -> None:
    given = ["a b", "", "it's", '"$HOME"', "*", "new\nline", "\\"]
    show = "import sys; print(sys.argv[1:])"
    assert finish(start(tmp_path, sys.executable, "-c", show, *given)) == (0, f"{given}\n")


def test_each_node_has_its_folder_for_temporary_files(tmp_path: Path) -> None:
    assert finish(start(tmp_path, "bash", "-c", 'test -d "$TMPDIR" && rmdir "$TMPDIR"'))[0] == 0


def test_success_is_said_by_rank_0_alone(tmp_path: Path) -> None:
    assert finish(start(tmp_path, "true", rank=1))[0] == 0
    assert names(tmp_path) == []
    assert finish(start(tmp_path, "true"))[0] == 0
    assert names(tmp_path) == ["DONE"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 76, 134, 137, 138])
def test_a_failure_keeps_its_code_and_says_where(tmp_path: Path, code: int) -> None:
    assert finish(start(tmp_path, "bash", "-c", f"exit {code}", rank=2))[0] == code
    assert names(tmp_path) == ["rank-2.exit"]
    _, rank, said, host = (tmp_path / "rank-2.exit").read_text().split()
    assert (rank, said) == ("2", str(code))
    assert host


def test_a_trainer_that_is_killed_leaves_the_signal(tmp_path: Path) -> None:
    assert finish(start(tmp_path, "bash", "-c", "kill -9 $$"))[0] == 137
    assert (tmp_path / "rank-0.exit").read_text().split()[2] == "137"


@pytest.mark.parametrize("by", ["USR1", "ABRT"])
def test_a_trainer_that_a_stop_kills_before_it_listens_or_aborts_for_another_that_was_faster_has_not_failed(
    tmp_path: Path, by: str
) -> None:
    dies = f"signal.signal(signal.SIG{by}, signal.SIG_DFL); signal.raise_signal(signal.SIG{by})"
    process = start(tmp_path, sys.executable, "-c", TRAINER.replace("sys.exit(75)", dies))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0
    assert names(tmp_path) == ["STOPPED"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_reaches_the_trainer_and_ends_with_success_so_that_srun_spares_the_others(
    tmp_path: Path, number: signal.Signals
) -> None:
    processes = [start(tmp_path, sys.executable, "-c", TRAINER, rank=rank) for rank in (0, 1)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # Slurm is known to send it twice.
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)
    assert [finish(process)[0] for process in processes] == [0, 0]
    assert names(tmp_path) == ["STOPPED"]
