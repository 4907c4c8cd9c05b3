"""Arms are trained alike but for their data, whatever happens to them on the way, and then compared."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_arms import MACHINE, SETTINGS, prepared_experiment, write_arms, write_file

from distributed import run_distributed
from nanochat.checkpoint.folders import list_steps
from nanochat.errors import DataError, UsageError
from nanochat.experiment.compare import compare
from nanochat.experiment.prepare import prepare
from nanochat.experiment.records import read_results
from nanochat.experiment.run import curve, run_arm
from nanochat.experiment.specification import Experiment, ExperimentFolder, read_experiment
from nanochat.files import lock_folder, read_json, write_json
from nanochat.runtime import Runtime
from nanochat.tracking.console import Console
from nanochat.tracking.runs import RunRecord, stage_folders
from nanochat.workspace import Workspace

CPU = Runtime(torch.device("cpu"), torch.float32)
Toy = tuple[Experiment, ExperimentFolder]


def train(toy: Toy, arm: str, seed: int, runtime: Runtime = CPU, **options: Any) -> dict[str, Any]:
    return run_arm(*toy, arm, seed, MACHINE, runtime, **options)


def without_clocks(record: dict[str, Any]) -> dict[str, Any]:
    """A record but for what is not the run's own: clocks, the machine, and sources that may be worked on meanwhile."""
    curves = {
        name: {column: values for column, values in points.items() if column != "seconds"}
        for name, points in record["curves"].items()
    }
    return {**record, "curves": curves, "environment": None, "software": None}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Both arms trained with both seeds."""
    toy = prepared_experiment(tmp_path_factory.mktemp("toy"))
    for arm in ("clean", "noisy"):
        for seed in (1, 2):
            train(toy, arm, seed)
    return toy


def test_every_run_trains_on_the_same_number_of_tokens(toy: Toy) -> None:
    records = read_results(*toy)
    assert len(records) == 4
    assert len({(record["steps"], record["tokens"]) for record in records.values()}) == 1
    assert {record["state"] for record in records.values()} == {"finished"}


def test_runs_differ_in_data_and_seed_alone(toy: Toy) -> None:
    records = read_results(*toy)
    identities = [{**record["identity"], "data": None} for record in records.values()]
    assert all(identity == identities[0] for identity in identities)
    assert len({record["identity"]["data"] for record in records.values()}) == 2
    assert len({record["checkpoint"] for record in records.values()}) == 4


def test_the_runs_of_an_experiment_are_one_group_of_a_project_of_their_own(toy: Toy) -> None:
    experiment, places = toy
    names = [record.names for arm, seed in read_results(*toy) for record in records_of(experiment, places, arm, seed)]
    assert len(names) == 4
    assert {(name.project, name.group) for name in names} == {("nanochat-experiments", "toy")}
    assert not {"WANDB_PROJECT", "WANDB_RUN_GROUP"} & os.environ.keys()


def records_of(experiment: Experiment, places: ExperimentFolder, arm: str, seed: int) -> list[RunRecord]:
    run = experiment.run_name(experiment.arms[arm], seed)
    return [RunRecord.read(folder) for folder in stage_folders(places.arm(arm, run), run)]


def test_arms_begin_with_the_same_weights_for_the_same_seed(toy: Toy) -> None:
    first = {key: record["curves"]["bpb"]["value"][0] for key, record in read_results(*toy).items()}
    assert first["clean", 1] == first["noisy", 1]
    assert first["clean", 2] == first["noisy", 2]
    assert first["clean", 1] != first["clean", 2]


def test_every_run_is_measured_on_the_shared_set_and_on_each_arm_s_own(toy: Toy) -> None:
    for record in read_results(*toy).values():
        assert record["final"].keys() == {"bpb/shared", "bpb/clean", "bpb/noisy"}
        assert record["curves"]["bpb"]["value"][-1] == pytest.approx(record["final"]["bpb/shared"])
        assert record["curves"]["bpb"]["tokens"][-1] == record["tokens"]


def test_each_arm_is_better_at_what_it_read(toy: Toy) -> None:
    final = {key: record["final"] for key, record in read_results(*toy).items()}
    for seed in (1, 2):
        assert final["clean", seed]["bpb/clean"] < final["noisy", seed]["bpb/clean"]
        assert final["noisy", seed]["bpb/noisy"] < final["clean", seed]["bpb/noisy"]


def test_a_finished_run_is_not_trained_again(toy: Toy) -> None:
    before = toy[1].result("clean", 1).read_bytes()
    train(toy, "clean", 1)
    assert toy[1].result("clean", 1).read_bytes() == before


def test_an_arm_can_be_trained_where_only_its_own_tokens_are(toy: Toy, tmp_path: Path) -> None:
    experiment, places = toy
    there = ExperimentFolder(tmp_path / "there", Workspace(tmp_path))
    ignored = shutil.ignore_patterns("noisy", "results", "*_checkpoints", "runs")
    shutil.copytree(places.root, there.root, ignore=ignored)
    shutil.copytree(places.validation("noisy"), there.validation("noisy"))
    moved = {name: replace(arm, data=tmp_path / "not here") for name, arm in experiment.arms.items()}
    record = train((replace(experiment, arms=moved), there), "clean", 2)
    assert without_clocks(record) == without_clocks(read_results(*toy)["clean", 2])


def test_two_ranks_train_and_measure_the_same_arm(toy: Toy, tmp_path: Path) -> None:
    experiment, places = toy
    there = ExperimentFolder(tmp_path / "there", Workspace(tmp_path))
    shutil.copytree(places.root, there.root, ignore=shutil.ignore_patterns("results", "*_checkpoints", "runs"))
    run_distributed(train_on_ranks, 2, experiment, there)
    alone, together = read_results(*toy)["clean", 1], read_results(experiment, there)["clean", 1]
    assert together["hardware"].startswith("2 × ")
    assert together["tokens"] == alone["tokens"]
    # Another order of summation changes the last bits of a gradient, and the steps carry that on.
    assert together["final"] == pytest.approx(alone["final"], rel=1e-2)


def train_on_ranks(experiment: Experiment, places: ExperimentFolder) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    train((experiment, places), "clean", 1, Runtime(torch.device("cpu"), torch.float32, rank, world_size))


def test_the_same_arm_and_seed_cannot_be_trained_twice_at_once(toy: Toy) -> None:
    experiment, places = toy
    run = experiment.run_name(experiment.arms["noisy"], 2)
    with (
        lock_folder(places.arm("noisy", run).run(run), "the arm"),
        pytest.raises(UsageError, match="the arm noisy with seed 2 of toy is being written by another process"),
    ):
        train(toy, "noisy", 2)


def test_a_run_that_could_not_be_compared_is_refused_before_a_step(toy: Toy, tmp_path: Path) -> None:
    places = toy[1]
    deeper = read_experiment(write_file(tmp_path, settings=SETTINGS.replace("depth = 1", "depth = 2")))
    deeper = replace(deeper, arms={name: replace(arm, data=None) for name, arm in deeper.arms.items()})
    with pytest.raises(UsageError, match=r"could not be compared: .*settings.base.depth 1, now 2.*\(4 differences\)"):
        train((deeper, places), "clean", 1)
    with pytest.raises(UsageError, match="float32"):
        train(toy, "clean", 1, replace(CPU, compute_dtype=torch.bfloat16))
    record = read_json(places.result("noisy", 1))
    try:
        write_json(places.result("noisy", 1), {**record, "software": {**record["software"], "code": "0123"}})
        with pytest.raises(UsageError, match="noisy with seed 1 was trained with code 0123, now"):
            train(toy, "clean", 1)
        train(toy, "clean", 1, allow_other_software=True)
        compare(*toy)
        assert "the runs were made by different code: 0123" in (places.report / "report.md").read_text()
    finally:
        write_json(places.result("noisy", 1), record)


def test_a_run_that_goes_on_with_other_code_tells_of_both(toy: Toy, tmp_path: Path) -> None:
    experiment, places = toy
    there = ExperimentFolder(tmp_path / "there", Workspace(tmp_path))
    shutil.copytree(places.root, there.root, ignore=shutil.ignore_patterns("results", "*_checkpoints", "runs"))
    record = read_json(places.result("clean", 1))
    begun = {**record, "state": "started", "software": {**record["software"], "code": "0123"}}
    write_json(there.result("clean", 1), begun)
    assert train((experiment, there), "clean", 1, allow_other_software=True)["software"] == {
        **record["software"],
        "code": f"0123 then {record['software']['code']}",
    }


def test_a_run_that_fails_before_its_first_step_leaves_no_record(toy: Toy, tmp_path: Path) -> None:
    experiment, places = toy
    there = ExperimentFolder(tmp_path / "there", Workspace(tmp_path))
    shutil.copytree(places.root, there.root, ignore=shutil.ignore_patterns("results", "*_checkpoints", "runs"))
    tokens = next(there.arm("clean").tokens.glob("train_*.tokens*"))
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="does not match its checksum"):
        train((experiment, there), "clean", 1)
    assert read_results(experiment, there) == {}
    # One that may have trained elsewhere is not forgotten.
    begun = {**read_json(places.result("clean", 1)), "state": "started"}
    write_json(there.result("clean", 1), begun)
    with pytest.raises(DataError, match="does not match its checksum"):
        train((experiment, there), "clean", 1)
    assert list(read_results(experiment, there)) == [("clean", 1)]


def test_what_is_not_in_the_file_is_refused(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no seed 7 — choose of 1, 2"):
        train(toy, "clean", 7)
    with pytest.raises(UsageError, match="has no arm 'clena' — choose of clean, noisy"):
        train(toy, "clena", 1)
    with pytest.raises(DataError, match=r"prepared.json is missing — nanochat experiment prepare"):
        train((toy[0], ExperimentFolder(tmp_path, Workspace(tmp_path))), "clean", 1)


def test_a_killed_run_ends_with_the_same_record(toy: Toy, tmp_path: Path) -> None:
    write_arms(tmp_path)
    file = write_file(tmp_path)
    experiment = read_experiment(file)
    places = ExperimentFolder.of(experiment, Workspace(tmp_path / "workspace"))
    prepare(experiment, places, Console(enabled=False), workers=1)
    flags = ("--arm", "noisy", "--seed", "2", "--device", "cpu", "--dtype", "float32", "--wandb", "disabled")
    command = [sys.executable, "-m", "nanochat", "experiment", "run", str(file), *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "workspace")}
    checkpoints = places.arm("noisy").checkpoints("base", "d1-s2")
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list_steps(checkpoints) and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert read_results(experiment, places)["noisy", 2]["state"] == "started"
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    expected = without_clocks(read_results(*toy)["noisy", 2])
    assert without_clocks(read_results(experiment, places)["noisy", 2]) == expected


def test_a_comparison_is_written_with_verdict_picture_and_figures(toy: Toy) -> None:
    experiment, places = toy
    [verdict] = compare(experiment, places)
    assert "(shared validation; 2 seeds, paired)" in verdict
    report = read_json(places.report / "report.json")
    assert report["verdicts"] == [verdict]
    for arm in ("clean", "noisy"):
        scores = [record["final"]["bpb/shared"] for (name, _), record in read_results(*toy).items() if name == arm]
        assert report["means"]["bpb/shared"][arm]["mean"] == pytest.approx(sum(scores) / 2)
    assert (places.report / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (places.report / "report.md").read_text()
    assert f"**{verdict}**" in text
    assert all(f"\n| {run} |" in text for run in ("toy-clean-d1-s1", "toy-noisy-d1-s2"))
    assert "two seeds give wide intervals" in text


def test_runs_that_are_missing_are_said_to_be(toy: Toy, tmp_path: Path) -> None:
    experiment, places = toy
    hidden = places.result("noisy", 2).rename(tmp_path / "hidden.json")
    try:
        [verdict] = compare(experiment, places)
        assert "no verdict" in verdict
        assert "not counted: noisy with seed 2" in (places.report / "report.md").read_text()
        both = places.result("noisy", 1).rename(tmp_path / "other.json")
        with pytest.raises(DataError, match="holds finished runs of 1 arms, too few to compare"):
            compare(experiment, places)
        both.rename(places.result("noisy", 1))
    finally:
        hidden.rename(places.result("noisy", 2))


def test_no_verdict_is_given_on_runs_with_hidden_differences(toy: Toy) -> None:
    experiment, places = toy
    record = read_json(places.result("noisy", 1))
    identity = {**record["identity"], "tokenizer": "0123"}
    try:
        write_json(places.result("noisy", 1), {**record, "identity": identity})
        [verdict] = compare(experiment, places)
    finally:
        write_json(places.result("noisy", 1), record)
    assert verdict.startswith("no verdict, as these runs differ in more than the experiment declares")
    assert "tokenizer 0123" in verdict


def test_a_damaged_record_is_named(toy: Toy, tmp_path: Path) -> None:
    experiment, _ = toy
    places = ExperimentFolder(tmp_path, Workspace(tmp_path))
    write_json(places.result("clean", 1), {"arm": "clean"})
    with pytest.raises(DataError, match=r"clean-s1.json is damaged — rm"):
        compare(experiment, places)


def test_evaluations_are_placed_between_the_steps_that_were_logged() -> None:
    rows = [
        {"step": 0, "epoch/bpb_shared": 3.0},
        *({"step": step, "batch/tokens": step * 10, "batch/flops": step * 70, "batch/train_seconds": step / 4}
          for step in (4, 8)),
        {"step": 6, "epoch/bpb_shared": 2.0},
    ]  # fmt: skip
    points = {"tokens": [0, 60], "flops": [0, 420], "seconds": [0, 1.5], "value": [3.0, 2.0]}
    assert curve(rows, "epoch/bpb_shared") == points


def test_the_stages_after_base_are_trained_and_examined_too(tmp_path: Path) -> None:
    chat = 'tasks = ["arithmetic:60"]\nnum_steps = 2\nlanes = 4\npool_size = 8\neval_tokens = 512\nbatch_fraction = 1\n'
    settings = SETTINGS.replace(
        "[tokenizer]",
        f'[settings.sft]\nsource = "base"\n{chat}\n[settings.eval]\nmax_problems = 4\nmax_new_tokens = 4\n[tokenizer]',
    ).replace("sequence_len = 32", "sequence_len = 128")
    top = 'name = "toy"\nseeds = [1]\nstages = ["base", "sft", "eval"]\nbudget = { steps = 2 }\n'
    toy = prepared_experiment(tmp_path, top=top, settings=settings)
    final = [train(toy, arm, 1)["final"] for arm in ("clean", "noisy")]
    assert all(0 <= scores["sft/arithmetic"] <= 1 for scores in final)
    compare(*toy)
    assert "| sft/arithmetic |" in (toy[1].report / "report.md").read_text()
