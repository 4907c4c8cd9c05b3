"""What an experiment will do, and whether its arms can be compared: checked and shown before anything is spent."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.errors import NanochatError
from nanochat.experiment.records import (
    corpus_fingerprint,
    corpus_of,
    hidden_differences,
    horizon_of,
    mixtures_of,
    prepare_command,
    read_prepared,
    read_results,
    software,
)
from nanochat.experiment.specification import SHARED_SET, Experiment, ExperimentFolder
from nanochat.model.size import parameter_counts
from nanochat.tasks.mixture import check_mixtures
from nanochat.tracking.console import format_count
from nanochat.training.recipe import base_shape

UNKNOWN = "–"


@dataclass
class Plan:
    """A plan.

    Attributes:
        differs: by what, a value for each arm, in the order of the arms.
        equal: by what, the one value.
        problems: what keeps the arms from being compared, each with what mends it.
        notes: what a reader should know.
    """

    differs: dict[str, list[str]] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sort(self, name: str, values: Sequence[str]) -> None:
        """Enter a value of each arm where it belongs."""
        if len(set(values)) == 1:
            self.equal[name] = values[0]
        else:
            self.differs[name] = list(values)


def make_plan(experiment: Experiment, folder: ExperimentFolder) -> Plan:
    """Look at everything at once. What is wrong goes into the plan, the rest of which is still worth reading."""
    plan = Plan()
    _plan_settings(plan, experiment)
    prepared = None
    if folder.prepared.exists():
        try:
            prepared = read_prepared(experiment, folder)
            _plan_data(plan, experiment, prepared)
        except NanochatError as error:
            plan.problems.append(str(error))
    else:
        plan.notes.append(f"not prepared yet: {prepare_command(experiment)}")
        _plan_sources(plan, experiment, folder)
    if prepared is not None:
        _plan_results(plan, experiment, folder, prepared)
    mixtures = [tasks for arm in experiment.arms.values() for tasks in mixtures_of(experiment, arm)]
    try:
        check_mixtures(mixtures, folder.shared.task_data)
    except NanochatError as error:
        plan.problems.append(str(error))
    return plan


def as_json(experiment: Experiment) -> dict[str, Any]:
    """What a scheduler needs: the runs, and the arguments of the `nanochat` commands that go before them, in order."""
    return {
        "name": experiment.name,
        "arms": [
            {"arm": arm.name, "seed": seed, "run": experiment.run_name(arm, seed)}
            for arm in experiment.arms.values()
            for seed in experiment.seeds
        ],
        "prepare": [["experiment", "prepare", str(experiment.file.absolute())]],
    }


def render(plan: Plan, experiment: Experiment) -> str:
    """The plan as tables for the terminal."""
    arms = list(experiment.arms)
    rows = [["what differs", *arms], *([name, *values] for name, values in plan.differs.items())]
    equal = [["what is equal", ""], *([name, value] for name, value in plan.equal.items())]
    notes = [f"note: {note}" for note in plan.notes]
    return "\n".join([_columns(rows), "", _columns(equal), *(["", *notes] if notes else [])])


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _plan_settings(plan: Plan, experiment: Experiment) -> None:
    for name in sorted({name for arm in experiment.arms.values() for name in arm.differs}):
        own = [arm.differs.get(name, getattr(arm.settings.base, name, "as shared")) for arm in experiment.arms.values()]
        plan.differs[f"setting {name}"] = [str(value) for value in own]
    arms = [arm.settings.base for arm in experiment.arms.values()]
    shapes = [base_shape(arm, experiment.tokenizer.vocab_size) for arm in arms]
    sizes = [format_count(parameter_counts(shape)["total"]) for shape in shapes]
    plan.sort(
        "model",
        [f"{arm.tag}, {size} parameters, context {arm.sequence_len}" for arm, size in zip(arms, sizes, strict=True)],
    )
    plan.sort(
        "schedule",
        [
            f"≤ {arm.warmup_steps} steps up, the last {arm.warmdown_ratio:.0%} down to {arm.final_lr_fraction:.0%}"
            for arm in arms
        ],
    )
    plan.equal["seeds"] = ", ".join(map(str, experiment.seeds))
    plan.equal["stages"] = ", ".join(experiment.stages)
    budget = experiment.budget
    plan.equal["budget"] = (
        "one pass over the smallest arm" if budget.kind == "smallest" else f"{budget.amount:,} {budget.kind}"
    )
    if len(experiment.seeds) == 1:
        plan.notes.append("one seed cannot tell a difference from noise; three give a first interval")


def _plan_sources(plan: Plan, experiment: Experiment, folder: ExperimentFolder) -> None:
    """Before anything was prepared: the corpora that are there already."""
    found = []
    for name, arm in experiment.arms.items():
        if arm.commands and not corpus_of(folder, arm).is_dir():
            found.append("made by " + " && ".join(shlex.join(words[:2]) for words in arm.commands))
            continue
        try:
            found.append(corpus_fingerprint(corpus_of(folder, arm), f"arms.{name}.data"))
        except NanochatError as error:
            plan.problems.append(str(error))
            found.append(UNKNOWN)
    plan.differs["data"] = found
    _refuse_equal_arms(plan, experiment, found)
    if experiment.validation_folder is not None:
        try:
            corpus_fingerprint(experiment.validation_folder, "validation.folder")
        except NanochatError as error:
            plan.problems.append(str(error))


def _plan_data(plan: Plan, experiment: Experiment, prepared: Mapping[str, Any]) -> None:
    about = [prepared["arms"][name] for name in experiment.arms]
    horizons = [horizon_of(experiment, arm, prepared) for arm in experiment.arms.values()]
    _refuse_equal_arms(plan, experiment, [arm["fingerprint"] for arm in about])
    plan.differs["data"] = [arm["corpus"] for arm in about]
    plan.differs["documents"] = [f"{arm['documents']:,}" for arm in about]
    plan.differs["tokens there are"] = [f"{arm['tokens']:,}" for arm in about]
    plan.differs["bytes per token"] = [f"{arm['text_bytes'] / arm['tokens']:.3f}" for arm in about]
    passes = [horizon.tokens / arm["tokens"] for arm, horizon in zip(about, horizons, strict=True)]
    plan.differs["passes over them"] = [f"{value:.3f}" for value in passes]
    plan.sort("tokens trained on", [f"{horizon.tokens:,}" for horizon in horizons])
    plan.sort("steps", [f"{horizon.num_steps:,}" for horizon in horizons])
    plan.sort("tokens per step", [f"{horizon.total_batch_size:,}" for horizon in horizons])
    mix = ", ".join(f"{share:.0%} {name}" for name, share in experiment.tokenizer_shares.items())
    plan.equal["tokenizer"] = f"{prepared['tokenizer']}, {experiment.tokenizer.vocab_size:,} tokens, from {mix}"
    for name, validation in prepared["validation"].items():
        what = "validation, shared" if name == SHARED_SET else f"validation, of {name}"
        left_out = f"; {validation['left_out']:,} left out, as an arm trains on them" if validation["left_out"] else ""
        plan.equal[what] = (
            f"{validation['documents']:,} documents, {format_count(validation['tokens'])} tokens{left_out}"
        )
    if experiment.budget.kind == "epochs":
        plan.notes.append("the budget is in epochs: arms of another size train on another number of tokens")
    if max(passes) > 1.5:
        plan.notes.append(f"an arm is repeated {max(passes):.1f} times; beyond about 4 repeated text teaches little")


def _refuse_equal_arms(plan: Plan, experiment: Experiment, data: Sequence[str]) -> None:
    arms = list(experiment.arms.values())
    for index, arm in enumerate(arms):
        for other, same in zip(arms[:index], data[:index], strict=True):
            if same == data[index] and same != UNKNOWN and arm.data is not None and arm.differs == other.differs:
                plan.problems.append(
                    f"{other.name} and {arm.name} are the same data with the same settings — "
                    f"mend arms.{arm.name}, or say under arms.{arm.name}.differs what differs"
                )


def _plan_results(plan: Plan, experiment: Experiment, folder: ExperimentFolder, prepared: Mapping[str, Any]) -> None:
    try:
        results = read_results(experiment, folder)
        now = software()
        plan.equal["software"] = ", ".join(f"{name} {value}" for name, value in now.items())
        started = sum(record["state"] != "finished" for record in results.values())
        total = len(experiment.arms) * len(experiment.seeds)
        plan.equal["runs"] = f"{len(results) - started} of {total} finished, {started} started"
        mend = f"restore that, or give the experiment another name in {experiment.file}"
        plan.problems += [f"{text} — {mend}" for text in hidden_differences(experiment, prepared, results, now)]
    except NanochatError as error:
        plan.problems.append(str(error))
