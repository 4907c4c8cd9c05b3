"""One line on the login node ends in a report: on one node, on two, and with other jobs on the same hosts at once."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from cluster_account import Account, fresh_account
from cluster_runs import SHORT, give_texts
from local_slurm import SlurmCluster

from texts import small_texts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODES = {"one_node": 1, "two_nodes": 2, "beside_it": 2}


@contextmanager
def listening(port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


@pytest.fixture(scope="module")
def finished(cluster: SlurmCluster) -> Iterator[dict[str, tuple[Account, str]]]:
    """The same run three times, all at once: on one node, and twice on the same two. By name: account and job."""
    with ExitStack() as stack:
        one, two, three = (stack.enter_context(fresh_account(cluster)) for _ in NODES)
        # Somebody listens already on the ports that the jobs' numbers lead to.
        # Some numbers go to what `sbatch --test-only` tries.
        for job in range(cluster.next_job(), cluster.next_job() + 3 * len(NODES)):
            stack.enter_context(listening(20000 + job))
        accounts = dict(zip(NODES, (one, two, three)))
        jobs = {
            name: account.submit(
                *("speedrun", "--nodes", str(NODES[name]), "--gpus", "0", "--cpus", "1", "--time", "10", "--"),
                *("--data", give_texts(account), *SHORT),
                WANDB_RUN=name,
            )
            for name, account in accounts.items()
        }
        for name, job in jobs.items():
            accounts[name].finish(job, seconds=300)
        yield {name: (accounts[name], jobs[name]) for name in NODES}


@pytest.mark.parametrize("name", NODES)
def test_a_speedrun_of_one_line_ends_with_a_report(finished: dict[str, tuple[Account, str]], name: str) -> None:
    account, job = finished[name]
    report = (account.workspace / "report/report.md").read_text()
    assert name in report
    assert [account.checkpoints(stage)[-1] for stage in ("base", "mid", "chatsft")] == [8, 4, 4]
    assert list(account.workspace.glob(f"runs/{name}/logs/{job}/DONE"))
    assert f"job {job}: done" in account.log(job)


@pytest.mark.parametrize("name", NODES)
def test_as_many_ranks_train_as_were_asked_for(finished: dict[str, tuple[Account, str]], name: str) -> None:
    account, _ = finished[name]
    section = json.loads((account.workspace / "report/sections/base.json").read_text())
    assert section["figures"]["Devices"].startswith(f"{NODES[name]} × cpu")


def test_arguments_with_blanks_quotes_and_dollars_arrive_as_they_are(finished: dict[str, tuple[Account, str]]) -> None:
    # The text lies in a folder of such a name, and in no other.
    account, _ = finished["two_nodes"]
    manifest = json.loads((account.workspace / "base_data/manifest.json").read_text())
    assert sum(totals["rows"] for totals in manifest["totals"].values()) == len(small_texts())


def test_two_nodes_train_what_one_does_with_accumulation(finished: dict[str, tuple[Account, str]]) -> None:
    for stage, steps in (("base", 8), ("mid", 4), ("sft", 4)):
        one, two = (finished[name][0].losses(name, stage) for name in ("one_node", "two_nodes"))
        assert len(one) == steps
        # Another order of additions, which grows with the steps.
        assert two == pytest.approx(one, rel=1e-2)
        if stage == "base":
            assert two[0] == pytest.approx(one[0], abs=1e-6)


def test_jobs_on_the_same_hosts_do_not_meet(finished: dict[str, tuple[Account, str]]) -> None:
    first, second = (finished[name][0] for name in ("two_nodes", "beside_it"))
    # Had a rank joined the other job, one of both would have trained less, or hung.
    assert first.weights(8) == second.weights(8)
    for account, job in finished.values():
        assert re.search(r"port \d+ of test-cpu\d is taken", account.log(job))
