"""Several jobs by one line: an experiment's arms, and a corpus that is made in parts."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster_account import Account

from nanochat.corpus.shards import write_corpus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

EXPERIMENT = """
name = "toy"
seeds = [1]
budget = { steps = 4 }

[settings]
depth = 1
aspect_ratio = 32
head_dim = 32
sequence_len = 32
lanes = 4
pool_size = 8
total_batch_size = 256
device_batch_size = 8
scale_hyperparameters = false
weight_decay = 0.0
eval_every = 0
eval_tokens = 1024

[tokenizer]
vocab_size = 300

[validation]
tokens = 1024

[arms.plain]
data = "plain"

[arms.shouted]
data = "shouted"
"""


def test_an_experiment_trains_every_arm_after_preparation_and_compares_them(account: Account) -> None:
    folder = account.scratch / "experiment"
    account.write(folder / "exp.toml", EXPERIMENT)
    texts = [f"{n} plus {n % 7} is {n + n % 7}." for n in range(300)]
    for arm, words in (("plain", texts), ("shouted", [text.upper() for text in texts])):
        write_corpus(folder / arm, iter(words), rows_per_shard=100, source={"name": arm}, validation_rows=40)
    options = ("--gpus", "0", "--cpus", "1", "--time", "10", "--", "--device", "cpu", "--dtype", "float32")
    done = account.try_to_submit("experiment", folder / "exp.toml", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {name: job for job, name in re.findall(r"^job (\d+) +(\S+)", done.stdout, re.MULTILINE)}
    assert list(jobs) == ["toy-prepare", "toy-plain-d1-s1", "toy-shouted-d1-s1", "toy-compare"]
    account.finish(jobs["toy-compare"], seconds=240)
    results = [json.loads(path.read_text()) for path in account.workspace.glob("experiments/toy/results/*.json")]
    assert len(results) == 2
    assert (account.workspace / "experiments/toy/report/report.md").is_file()


def test_parts_are_made_by_an_array_and_completed_by_the_job_after_it(account: Account) -> None:
    source = account.scratch / "source"
    source.mkdir()
    for number in range(3):
        texts = [f"document {number} {row}" for row in range(100)]
        pq.write_table(pa.table({"text": texts}), source / f"{number}.parquet")
    command = ("data", "subset", "--ratio", "0.5", "--source", source, "--columns", "text", "--rows-per-shard", "50")
    done = account.try_to_submit("prepare", "--array", "2", "--cpus", "1", "--", *command, WANDB_RUN="parts")
    found = re.search(r"^then +job (\d+)", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    account.finish(found[1])
    manifest = json.loads((account.workspace / "base_data/manifest.json").read_text())
    assert sum(totals["rows"] for totals in manifest["totals"].values()) == pytest.approx(150, abs=40)
    logs = {path.name for path in account.workspace.glob("runs/parts/logs/*.log")}
    assert len(logs) == 3
