"""A plan shows what differs and what is equal, gives every arm the same tokens, and refuses what is hidden."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_arms import ARMS, SETTINGS, TOP, prepared_experiment, write_arms, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import ExitCode
from nanochat.experiment.plan import make_plan, render
from nanochat.experiment.records import hidden_differences, horizon_of, read_prepared, software, training_identity
from nanochat.experiment.specification import Budget, BudgetKind, Experiment, ExperimentFolder, read_experiment
from nanochat.files import write_json
from nanochat.workspace import Workspace


def prepared_with(**tokens: int) -> dict[str, Any]:
    return {"arms": {name: {"tokens": count, "fingerprint": name} for name, count in tokens.items()}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return read_experiment(write_file(tmp_path_factory.mktemp("toy")))


@settings(deadline=None)
@given(clean=st.integers(10**5, 10**9), noisy=st.integers(10**5, 10**9), explicit=st.booleans(), scale=st.booleans())
def test_the_smallest_arm_sets_the_tokens_of_all(
    toy: Experiment, clean: int, noisy: int, explicit: bool, scale: bool
) -> None:
    prepared = prepared_with(clean=clean, noisy=noisy)
    if not explicit:
        base = replace(toy.settings.base, total_batch_size=None, scale_hyperparameters=scale)
        own = replace(toy.settings, base=base)
        toy = replace(toy, settings=own, arms={name: replace(arm, settings=own) for name, arm in toy.arms.items()})
    horizons = {name: horizon_of(toy, arm, prepared) for name, arm in toy.arms.items()}
    assert horizons["clean"] == horizons["noisy"]
    horizon = horizons["clean"]
    assert 0 <= min(clean, noisy) - horizon.tokens < horizon.total_batch_size


@pytest.mark.parametrize(
    ("kind", "amount", "clean", "noisy"),
    [
        ("tokens", 5000, 19, 19),
        ("steps", 7, 7, 7),
        # Only here the arms differ, as the file then says: 2 × 10,000 and 2 × 30,000 tokens in steps of 256.
        ("epochs", 2, 78, 234),
    ],
)
def test_a_budget_can_be_declared(toy: Experiment, kind: BudgetKind, amount: float, clean: int, noisy: int) -> None:
    prepared = prepared_with(clean=10_000, noisy=30_000)
    experiment = replace(toy, budget=Budget(kind, amount))
    steps = [horizon_of(experiment, arm, prepared).num_steps for arm in experiment.arms.values()]
    assert steps == [clean, noisy]


def test_an_arm_with_another_batch_gets_the_same_tokens_to_within_a_step(tmp_path: Path) -> None:
    experiment = read_experiment(write_file(tmp_path, arms=f"{ARMS}differs = {{ total_batch_size = 96 }}"))
    prepared = prepared_with(clean=10_000, noisy=30_000)
    clean, noisy = (horizon_of(experiment, arm, prepared) for arm in experiment.arms.values())
    assert 0 <= clean.tokens - noisy.tokens < 96


def test_the_plan_shows_differences_and_what_is_equal(tmp_path: Path) -> None:
    arms = f"{ARMS}differs = {{ weight_decay = 0.5 }}"
    experiment, places = prepared_experiment(tmp_path, arms=arms)
    plan = make_plan(experiment, places)
    assert plan.problems == []
    assert plan.differs["setting weight_decay"] == ["0.0", "0.5"]
    assert {"data", "documents", "tokens there are", "passes over them"} <= plan.differs.keys()
    assert {"tokenizer", "steps", "tokens trained on", "tokens per step", "schedule", "seeds"} <= plan.equal.keys()
    text = render(plan, experiment)
    assert "what differs" in text
    assert "what is equal" in text


def test_arms_that_are_the_same_are_refused(tmp_path: Path) -> None:
    arms = ARMS.replace('data = "noisy"', 'data = "clean"')
    experiment, places = prepared_experiment(tmp_path, arms=arms)
    assert any("same data with the same settings" in problem for problem in make_plan(experiment, places).problems)
    openly = read_experiment(write_file(tmp_path, arms=f"{arms}differs = {{ weight_decay = 0.5 }}"))
    assert make_plan(openly, places).problems == []


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    top = f'{TOP}stages = ["base", "sft"]\n'
    experiment = read_experiment(write_file(tmp_path, top=top))
    problems = make_plan(experiment, ExperimentFolder.of(experiment, Workspace(tmp_path / "workspace"))).problems
    assert sum("manifest.json is missing" in problem for problem in problems) == 2
    assert any("smoltalk" in problem for problem in problems)


def record_of(experiment: Experiment, places: ExperimentFolder, arm: str, **other: Any) -> dict[str, Any]:
    """A record as a run would have left it, but for what is given."""
    identity = training_identity(experiment, experiment.arms[arm], read_prepared(experiment, places))
    about = {"arm": arm, "seed": 1, "run": "r", "state": "finished", "dtype": "float32"}
    return {**about, "identity": identity, "software": software(), **other}


def test_a_run_made_with_anything_else_is_a_hidden_difference(tmp_path: Path) -> None:
    experiment, places = prepared_experiment(tmp_path)
    prepared = read_prepared(experiment, places)
    as_declared = record_of(experiment, places, "clean")
    identity = as_declared["identity"]
    assert hidden_differences(experiment, prepared, {("clean", 1): as_declared}, software()) == []
    others = {
        "settings.base.depth 2, now 1": {
            "identity": {**identity, "settings": {**identity["settings"], "base.depth": 2}}
        },
        "tokenizer 0123": {"identity": {**identity, "tokenizer": "0123"}},
        "data 0123": {"identity": {**identity, "data": "0123"}},
        "shared 0123": {"identity": {**identity, "validation": {**identity["validation"], "shared": "0123"}}},
        "code 0123": {"software": {**software(), "code": "0123"}},
        "image 0123": {"software": {**software(), "image": "0123"}},
    }
    for said, other in others.items():
        record = {**as_declared, **other}
        [found] = hidden_differences(experiment, prepared, {("clean", 1): record}, software())
        assert said in found
        write_json(places.result("clean", 1), record)
        assert any(said in problem for problem in make_plan(experiment, places).problems)
    [found] = hidden_differences(experiment, prepared, {("clean", 1): as_declared}, software(), "bfloat16")
    assert "bfloat16 and float32" in found


def test_the_command_prints_what_a_scheduler_needs(
    tmp_path: Path, run_command: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    write_arms(tmp_path)
    file = write_file(tmp_path)
    result = run_command("experiment", "plan", str(file), "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["name"] == "toy"
    assert told["arms"][1] == {"arm": "clean", "seed": 2, "run": "toy-clean-d1-s2"}
    assert len(told["arms"]) == 4
    assert told["prepare"] == [["experiment", "prepare", str(file)]]


def test_a_plan_with_problems_ends_as_a_failed_preflight(
    tmp_path: Path, run_command: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    file = write_file(tmp_path, TOP, SETTINGS, ARMS)
    result = run_command("experiment", "plan", str(file), "--json")
    assert result.returncode == ExitCode.PREFLIGHT
    assert result.stdout == ""
    assert result.stderr.count("problem: ") == 2
