"""What Slurm does to a job, the job survives: it ends with the weights of one that was left alone, byte for byte.

Where a test acts on a job in mid-training it stops the trainers' clock first, so that no machine is too fast for it.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_account import Account, fresh_account
from cluster_runs import LONG, LONG_STEPS, give_texts
from local_slurm import SlurmCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster) -> Iterator[str]:
    """The weights of a run that nobody stops."""
    with fresh_account(cluster) as account:
        account.finish(submit(account))
        yield account.weights(LONG_STEPS)


def submit(account: Account, *options: str, save_every: int = 0) -> str:
    """Submit the long run. It saves when it is stopped, and at its end; or also every so many steps."""
    training = ("--data", give_texts(account), "--save-every", str(save_every), *LONG)
    return account.submit(
        "speedrun", "--gpus", "0", "--cpus", "1", *(options or ("--time", "10")), "--", *training, WANDB_RUN="long"
    )


def pause_in_mid_training(account: Account, job: str) -> list[int]:
    """Wait until a job trains, and stop its trainers' clock. A stop in the first step would end it without a save."""
    account.wait_for_log(job, rf"step ([2-9]|\d\d+)/{LONG_STEPS} loss")
    return account.pause(job)


def carry_on(account: Account, ranks: list[int]) -> None:
    """Let the clock run again, now that the signal is at every trainer's door."""
    told = 1 << (signal.SIGUSR1 - 1)

    def is_told(rank: int) -> bool:
        pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{rank}/status").read_text(), re.MULTILINE)
        return pending is not None and bool(int(pending[1], 16) & told)

    account.cluster.wait_until(lambda: all(map(is_told, ranks)), "trainers are signalled", seconds=30)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)


def test_at_its_time_limit_a_job_saves_requeues_itself_and_carries_on(account: Account, undisturbed: str) -> None:
    account.write_site(SITE_STOP_BEFORE=60)
    job = submit(account, "--time", "2")
    ranks = pause_in_mid_training(account, job)
    assert account.checkpoints() == []
    account.wait_for_log(job, "SIGUSR1", seconds=130)
    carry_on(account, ranks)
    account.wait_for_log(job, "attempt 2")
    stopped_at = account.checkpoints()[0]
    assert 0 < stopped_at < LONG_STEPS
    account.finish(job)
    assert account.cluster.restarts(job) == 1
    # The log of the first attempt is still there.
    assert "attempt 1" in account.log(job)
    assert f"carrying on from step_{stopped_at:06d}" in account.log(job)
    assert account.weights(LONG_STEPS) == undisturbed


def test_a_cancelled_job_saves_and_is_resumed_by_hand(account: Account, undisturbed: str) -> None:
    job = submit(account)
    ranks = pause_in_mid_training(account, job)
    account.cluster.run("scancel", job)
    account.wait_for_log(job, "SIGTERM")
    carry_on(account, ranks)
    account.wait_for_log(job, "not requeued — carry on: WANDB_RUN=long slurm/submit resume")
    account.cluster.wait_for_state(job, "CANCELLED", seconds=60)
    (stopped_at,) = account.checkpoints()
    assert 0 < stopped_at < LONG_STEPS
    assert account.cluster.restarts(job) == 0
    resumed = account.submit("resume", WANDB_RUN="long")
    account.finish(resumed)
    assert f"carrying on from step_{stopped_at:06d}" in account.log(resumed)
    assert account.weights(LONG_STEPS) == undisturbed


def test_when_its_node_dies_a_job_goes_on_from_its_checkpoint(account: Account, undisturbed: str) -> None:
    job = submit(account, save_every=20)
    account.cluster.wait_until(account.checkpoints, "there is a checkpoint", seconds=90)
    account.pause(job)
    node = account.cluster.job(job)["NodeList"]
    account.cluster.crash(node)
    account.cluster.wait_for_state(job, "PENDING", seconds=90)
    kept = account.checkpoints()[-1]
    assert kept < LONG_STEPS
    account.cluster.boot(node)
    account.finish(job)
    assert f"carrying on from step_{kept:06d}" in account.log(job)
    assert account.weights(LONG_STEPS) == undisturbed


# In the place of nanochat: it leaves a piece of data, ends as asked by the first signal, and when run again it is done.
STAND_IN = """#!/bin/bash
for part; do :; done
piece=$NANOCHAT_BASE_DIR/tokens/${part%%/*}.receipt.json
if [[ $1 != data || -e $piece ]]; then exit 0; fi
mkdir -p "${piece%/*}"
trap 'touch "$piece"; exit 75' USR1
echo "part $part waits"
for ((second = 0; second < 300; second++)); do sleep 1; done
"""


def test_a_task_of_an_array_requeues_itself_and_not_its_siblings(account: Account) -> None:
    account.write(account.folder / "environment/bin/nanochat", STAND_IN)
    (account.folder / "environment/bin/nanochat").chmod(0o755)
    account.write_site(SITE_IMAGE="", SITE_VENV=account.folder / "environment")
    job = account.submit("prepare", "--array", "3", "--cpus", "1", "--", "data", "tokenize", WANDB_RUN="array")
    tasks = [f"{job}_{number}" for number in (1, 2, 3)]
    for task in tasks:
        account.wait_for_log(task, "waits")
    # The last one has the id of the whole array for its own.
    last = tasks[-1]
    assert account.cluster.job(last)["JobId"] == job
    account.cluster.run("scancel", "--batch", "--signal=USR1", last)
    account.finish(last)
    assert "attempt 2" in account.log(last)
    assert [account.cluster.job(task)["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert [account.cluster.job(task)["JobState"] for task in tasks[:2]] == ["RUNNING", "RUNNING"]
