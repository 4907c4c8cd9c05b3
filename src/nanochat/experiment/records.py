"""What an experiment leaves on disk, and whether it still belongs together.

`prepared.json` says what was prepared from what. `results/ARM-sSEED.json` is written when a run starts and again when
it has ended: what it was trained with, then how good it is; a run that fails before its first checkpoint takes it back.
Both are read before anything is done, so that nothing is ever compared that differs in more than its file declares.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nanochat.config import EvalConfig, TrainBaseConfig, TrainChatConfig
from nanochat.errors import DataError
from nanochat.experiment.specification import Arm, Experiment, ExperimentFolder
from nanochat.files import fingerprint, read_json, read_manifest
from nanochat.identity import describe_image, installed_version
from nanochat.tasks.mixture import parse_mixture
from nanochat.training.continuing import identity_fields
from nanochat.training.recipe import base_shape, make_recipe

# Of a run's settings, those that name it and those that only say how fast it is examined.
UNCOMPARED = frozenset({"seed", "model_tag", "batch_size"})
RECORD_KEYS = {"arm", "seed", "run", "state", "identity", "software", "dtype"}


@dataclass(frozen=True)
class Horizon:
    """How long an arm trains, and with which batch."""

    num_steps: int
    total_batch_size: int

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return self.num_steps * self.total_batch_size


def prepare_command(experiment: Experiment) -> str:
    """The command that prepares an experiment."""
    return f"nanochat experiment prepare {experiment.file}"


def corpus_of(folder: ExperimentFolder, arm: Arm) -> Path:
    """Where an arm's text is: a folder of the user's, or what its commands make."""
    return arm.data or folder.arm(arm.name).base_data


def inputs_of(experiment: Experiment, corpora: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what is prepared. Paths are not in it: the same data elsewhere is the same data.

    Args:
        corpora: fingerprints by arm.
    """
    validation = experiment.validation_folder
    return {
        "corpora": dict(corpora),
        "tokenizer": {
            **dataclasses.asdict(experiment.tokenizer),
            "shares": dict(experiment.tokenizer_shares),
            "corpora": {name: corpora[name] for name in experiment.tokenizer_shares},
        },
        "validation": {
            "shares": dict(experiment.validation_shares) if validation is None else None,
            "tokens": experiment.validation_tokens,
            "folder": corpus_fingerprint(validation, "validation.folder") if validation is not None else None,
        },
    }


def corpus_fingerprint(corpus: Path, what: str) -> str:
    """What a corpus holds, in one word.

    Raises:
        DataError: it is missing or damaged; `what` says where it is named.
    """
    fix = f"name a corpus folder under {what}; nanochat data makes one"
    value: str = read_manifest(corpus, "corpus", fix)["fingerprint"]
    return value


def read_prepared(experiment: Experiment, folder: ExperimentFolder) -> dict[str, Any]:
    """The record of what was prepared.

    Raises:
        DataError: nothing was, or from other data, or the file declares something else by now.
    """
    fix = prepare_command(experiment)
    record: dict[str, Any] = read_json(folder.prepared, fix)
    try:
        made_from = record["inputs"]
        corpora = dict(made_from["corpora"])
        if set(corpora) != set(experiment.arms):
            raise DataError(f"{folder.root} was prepared for the arms {', '.join(corpora)}", fix)
        for name, arm in experiment.arms.items():
            corpus = corpus_of(folder, arm)
            # A host that trains has tokens only.
            if corpus.is_dir():
                corpora[name] = corpus_fingerprint(corpus, f"arms.{name}.data")
        if experiment.validation_folder is not None and not experiment.validation_folder.is_dir():
            experiment = dataclasses.replace(experiment, validation_folder=None)
            made_from = {**made_from, "validation": None}
        now = inputs_of(experiment, corpora)
        changed = [part for part in now if made_from[part] not in (None, now[part])]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder.prepared} is damaged (no usable {error})", fix) from None
    if changed:
        raise DataError(f"{folder.root} was prepared with other {' and '.join(changed)}", fix)
    return record


def horizon_of(experiment: Experiment, arm: Arm, prepared: Mapping[str, Any]) -> Horizon:
    """How long an arm trains: the budget, in steps of its batch.

    The budget is reckoned once, with the settings that all share, so that every arm gets the same number of tokens,
    up to less than one step where an arm has a batch of its own. Only a budget of epochs is each arm's own.

    Raises:
        UsageError: the budget holds no step.
    """
    shared, vocab_size = experiment.settings.base, experiment.tokenizer.vocab_size
    counts = {name: about["tokens"] for name, about in prepared["arms"].items()}
    budget = experiment.budget
    if budget.kind == "steps":
        asked = dataclasses.replace(shared, num_steps=int(budget.amount))
    else:
        tokens = budget.amount if budget.kind == "tokens" else budget.amount * min(counts.values())
        # Passes over data of one token: a horizon in tokens.
        asked = dataclasses.replace(shared, target_epochs=float(tokens))
    common = make_recipe(asked, base_shape(shared, vocab_size), 1)
    tokens = budget.amount * counts[arm.name] if budget.kind == "epochs" else common.total_tokens
    own = arm.settings.base
    shape = base_shape(own, vocab_size)
    if own.total_batch_size is None and shape == base_shape(shared, vocab_size):
        own = dataclasses.replace(own, total_batch_size=common.total_batch_size)
    recipe = make_recipe(dataclasses.replace(own, target_epochs=float(tokens)), shape, 1)
    return Horizon(recipe.num_steps, recipe.total_batch_size)


def base_config(experiment: Experiment, arm: Arm, seed: int, horizon: Horizon) -> TrainBaseConfig:
    """The settings that an arm's base model is trained with."""
    return dataclasses.replace(
        arm.settings.base,
        seed=seed,
        model_tag=experiment.model_tag(arm, seed),
        num_steps=horizon.num_steps,
        total_batch_size=horizon.total_batch_size,
    )


def mixtures_of(experiment: Experiment, arm: Arm) -> list[tuple[str, ...]]:
    """The tasks that an arm's chosen stages train on, and those that they are examined with, if they are."""
    chosen = {"mid": arm.settings.mid.tasks, "sft": arm.settings.sft.tasks}
    trained = [tasks for stage, tasks in chosen.items() if stage in experiment.stages]
    return [*trained, evaluation_of(experiment, arm).tasks] if "eval" in experiment.stages else trained


def evaluation_of(experiment: Experiment, arm: Arm) -> EvalConfig:
    """What an arm is examined with: the tasks of the file, or those that its chosen stages train on."""
    settings = arm.settings
    if settings.evaluation.tasks or "eval" not in experiment.stages:
        return settings.evaluation
    chosen = [("mid", settings.mid.tasks), ("sft", settings.sft.tasks)]
    entries = parse_mixture([task for stage, tasks in chosen if stage in experiment.stages for task in tasks])
    return dataclasses.replace(settings.evaluation, tasks=tuple(dict.fromkeys(entry.task for entry in entries)))


def training_identity(experiment: Experiment, arm: Arm, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what a run of an arm becomes, but for seed, software and number format."""
    settings: dict[str, TrainBaseConfig | TrainChatConfig | EvalConfig] = {
        "base": base_config(experiment, arm, experiment.seeds[0], horizon_of(experiment, arm, prepared)),
        "mid": arm.settings.mid,
        "sft": arm.settings.sft,
        "eval": evaluation_of(experiment, arm),
    }
    return {
        "settings": {
            f"{stage}.{name}": list(value) if isinstance(value, tuple) else value
            for stage in experiment.stages
            for name, value in identity_fields(dataclasses.asdict(settings[stage])).items()
            if name not in UNCOMPARED
        },
        "tokenizer": prepared["tokenizer"],
        "validation": {name: about["fingerprint"] for name, about in prepared["validation"].items()},
        "data": prepared["arms"][arm.name]["fingerprint"],
    }


@cache
def software() -> dict[str, str]:
    """What computes: this package's own sources, the image, torch. Equal exactly when the code is, commit or not."""
    package = Path(__file__).parents[1]
    sources = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }
    image = describe_image()
    return {
        "code": fingerprint(sources),
        "image": image.get("fingerprint", "none")[:16],
        "torch": installed_version("torch") or "none",
    }


def read_results(experiment: Experiment, folder: ExperimentFolder) -> dict[tuple[str, int], dict[str, Any]]:
    """The records of all runs that have started, by arm and seed, in the order of the file.

    Raises:
        DataError: one is damaged.
    """
    found = {}
    for arm in experiment.arms:
        for seed in experiment.seeds:
            path = folder.result(arm, seed)
            if path.exists():
                record = read_json(path, f"rm {path}, and run it again: it carries on from its checkpoint")
                if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
                    raise DataError(f"{path} is damaged", f"rm {path}, and run it again")
                found[arm, seed] = record
    return found


def hidden_differences(
    experiment: Experiment,
    prepared: Mapping[str, Any],
    results: Mapping[tuple[str, int], Mapping[str, Any]],
    now: Mapping[str, str],
    dtype: str | None = None,
) -> list[str]:
    """What runs that have started were trained with, beside what the file declares today; empty if nothing.

    Args:
        now: the software of this process.
        dtype: the number format that this process would train in; None if it will not train.
    """
    found = []
    formats = {record["dtype"] for record in results.values()} | ({dtype} if dtype else set())
    if len(formats) > 1:
        found.append(f"runs compute in {' and '.join(sorted(formats))}")
    for (arm, seed), record in results.items():
        wanted = training_identity(experiment, experiment.arms[arm], prepared)
        changes = _changes(record["identity"], wanted) + _changes(record["software"], now)
        if changes:
            found.append(f"{arm} with seed {seed} was trained with {'; '.join(changes)}")
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every value that changed, tables entered: `settings.base.depth 2, now 3`."""
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += [f"{name}.{change}" for change in _changes(old, new)]
        elif old != new:
            changes.append(f"{name} {old}, now {new}")
    return changes
