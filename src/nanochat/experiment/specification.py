"""An experiment as its file declares it: arms that differ in their data, and everything that they share.

The file is TOML. What it says is checked whole before anything is done, and every mistake names its place. What
differs between arms beside the data has to stand under the arm's own `differs`, where a reader of the file, of the
plan and of the comparison sees it.
"""

import dataclasses
import math
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanochat.config import (
    LARGEST_SEED,
    EvalConfig,
    MachineConfig,
    TokenizerConfig,
    TrainBaseConfig,
    TrainMidConfig,
    TrainSFTConfig,
)
from nanochat.errors import UsageError
from nanochat.tokenizer.train import check_tokenizer_settings
from nanochat.training.recipe import base_shape, make_recipe
from nanochat.workspace import SAFE_NAME, Workspace

TrainedStage = Literal["base", "mid", "sft", "eval"]
BudgetKind = Literal["smallest", "epochs", "tokens", "steps"]

SECTIONS = {"mid": TrainMidConfig, "sft": TrainSFTConfig, "eval": EvalConfig}
SHARED_SET = "shared"

# What the file says otherwise, and what each machine says for itself.
ELSEWHERE = {
    **dict.fromkeys(("seed",), "list the seeds under seeds"),
    **dict.fromkeys(("num_steps", "target_flops", "target_epochs", "data_param_ratio"), "set the budget"),
    "model_tag": "it follows from depth and seed",
    **{
        field.name: f"give experiment run the flag --{field.name.replace('_', '-')}"
        for field in dataclasses.fields(MachineConfig)
    },
}
# Midtraining and SFT have horizons of their own, which the budget does not touch.
ELSEWHERE_OF_SECTION = {"seed": ELSEWHERE["seed"]}

# Names in an experiment's folder that an arm would take the place of.
RESERVED = {"tokenizer", "validation", "results", "report", "logs", SHARED_SET}

TYPE_NAMES = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}

Config = TypeVar("Config")


@dataclass(frozen=True)
class Budget:
    """How long each arm trains.

    Attributes:
        kind: `smallest`, one pass over the smallest arm; `epochs` over each arm's own data; `tokens`; or `steps`.
        amount: of epochs, tokens or steps.
    """

    kind: BudgetKind = "smallest"
    amount: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Everything about the training of one arm but seed, horizon, names and machine."""

    base: TrainBaseConfig
    mid: TrainMidConfig
    sft: TrainSFTConfig
    evaluation: EvalConfig


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: its name.
        data: a corpus folder; None where commands make it.
        commands: arguments of the `nanochat` commands that make the data, in order.
        differs: settings of its own, as the file says them.
        settings: all of its settings.
    """

    name: str
    data: Path | None
    commands: tuple[tuple[str, ...], ...]
    differs: Mapping[str, Any]
    settings: Settings


@dataclass(frozen=True)
class Experiment:
    """A whole experiment.

    Attributes:
        file: where it is declared.
        name: names its folder and its runs.
        seeds: each trains every arm once.
        budget: how long.
        stages: what is done with each arm and seed, first to last.
        settings: what the arms share.
        tokenizer: how the tokenizer is trained that all arms share.
        tokenizer_shares: of its training text, by arm; they sum to 1.
        validation_shares: of the shared validation set, by arm.
        validation_tokens: of the shared validation set, at most.
        validation_folder: a corpus whose validation shard is the shared set, in place of shares.
        arms: by name, in the order of the file. The first is what the others are compared with.
    """

    file: Path
    name: str
    seeds: tuple[int, ...]
    budget: Budget
    stages: tuple[TrainedStage, ...]
    settings: Settings
    tokenizer: TokenizerConfig
    tokenizer_shares: Mapping[str, float]
    validation_shares: Mapping[str, float]
    validation_tokens: int
    validation_folder: Path | None
    arms: Mapping[str, Arm]

    def arm(self, name: str) -> Arm:
        """One arm by its name.

        Raises:
            UsageError: there is no such arm.
        """
        if name not in self.arms:
            raise UsageError(f"{self.file} has no arm {name!r}", f"choose of {', '.join(self.arms)}")
        return self.arms[name]

    def model_tag(self, arm: Arm, seed: int) -> str:
        """The name of the model that an arm trains with a seed."""
        return f"{arm.settings.base.tag}-s{seed}"

    def run_name(self, arm: Arm, seed: int) -> str:
        """The name of a run. The number of devices is not in it: a run may go on on another number of them."""
        return f"{self.name}-{arm.name}-{self.model_tag(arm, seed)}"


@dataclass(frozen=True)
class ArmWorkspace(Workspace):
    """The workspace of one arm: data and models are its own, what serves every run is the base workspace's."""

    shared: Workspace
    report_folder: Path

    @property
    def task_data(self) -> Path:
        """Staged once for all."""
        return self.shared.task_data

    @property
    def eval_bundle(self) -> Path:
        """Staged once for all."""
        return self.shared.eval_bundle

    @property
    def wandb(self) -> Path:
        """Where W&B's run folders are looked for."""
        return self.shared.wandb

    @property
    def cache(self) -> Path:
        """The arms have the same model: what was compiled for one serves all."""
        return self.shared.cache

    @property
    def report(self) -> Path:
        """One per run, as the seeds of an arm may train at the same time."""
        return self.report_folder


@dataclass(frozen=True)
class ExperimentFolder:
    """Every path of one experiment, below the workspace."""

    root: Path
    shared: Workspace

    @classmethod
    def of(cls, experiment: Experiment, workspace: Workspace) -> "ExperimentFolder":
        """The folder of an experiment."""
        return cls(workspace.root / "experiments" / experiment.name, workspace)

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all arms."""
        return self.root / "tokenizer"

    @property
    def prepared(self) -> Path:
        """The record of what was prepared, and from what."""
        return self.root / "prepared.json"

    @property
    def results(self) -> Path:
        """One file per arm and seed."""
        return self.root / "results"

    @property
    def report(self) -> Path:
        """The comparison."""
        return self.root / "report"

    def validation(self, name: str) -> Path:
        """Tokens of a validation set: the shared one's or an arm's own."""
        return self.root / "validation" / name

    def result(self, arm: str, seed: int) -> Path:
        """The record of one arm with one seed."""
        return self.results / f"{arm}-s{seed}.json"

    def arm(self, name: str, run: str | None = None) -> ArmWorkspace:
        """The workspace of an arm, seen by one of its runs."""
        root = self.root / name
        return ArmWorkspace(root, self.shared, root / "runs" / run / "report" if run else root / "report")


def read_experiment(file: Path) -> Experiment:
    """Read and check an experiment's file.

    Raises:
        UsageError: it is missing, is not TOML, or says something that cannot be done; names the place.
    """
    try:
        # Editors on Windows put a mark before the first letter.
        declared = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{file} is missing", "docs/reference/experiment-file.md shows one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} cannot be read as TOML ({error})", "mend it there") from None
    try:
        return _experiment(file, declared)
    except UsageError as error:
        raise UsageError(f"{file}: {error.what}", error.fix) from None


def _experiment(file: Path, declared: dict[str, Any]) -> Experiment:
    known = ("name", "seeds", "budget", "stages", "settings", "tokenizer", "validation", "arms")
    _check_keys(declared, known, "")
    name = _checked(str, declared.get("name", ""), "name")
    _check_name(name, "name")
    shared = _table(declared, "settings", "settings")
    tokenizer = dict(_table(declared, "tokenizer", "tokenizer"))
    tokenizer_shares = tokenizer.pop("shares", {})
    training = _config(TokenizerConfig, tokenizer, "tokenizer", {})
    check_tokenizer_settings(**dataclasses.asdict(training))
    arms = _arms(file, _table(declared, "arms", "arms"), shared, training.vocab_size)
    validation = _table(declared, "validation", "validation")
    _check_keys(validation, ("shares", "tokens", "folder"), "validation")
    if {"shares", "folder"} <= validation.keys():
        raise UsageError("validation has both shares and a folder", "keep one of them")
    validation_tokens = _checked(int, validation.get("tokens", TrainBaseConfig.eval_tokens), "validation.tokens")
    if validation_tokens < 1:
        raise UsageError(f"validation.tokens is {validation_tokens}", "give 1 or more")
    return Experiment(
        file=file,
        name=name,
        seeds=_seeds(declared.get("seeds", [42])),
        budget=_budget(declared.get("budget", "smallest")),
        stages=_stages(declared),
        settings=_settings(shared, "settings"),
        tokenizer=training,
        tokenizer_shares=_shares(tokenizer_shares, tuple(arms), "tokenizer.shares"),
        validation_shares=_shares(validation.get("shares", {}), tuple(arms), "validation.shares"),
        validation_tokens=validation_tokens,
        validation_folder=_path(file, validation["folder"], "validation.folder") if "folder" in validation else None,
        arms=arms,
    )


def _check_name(name: str, what: str) -> None:
    if not SAFE_NAME.fullmatch(name) or len(name) > 40 or name in RESERVED:
        raise UsageError(
            f"{what} {name!r} cannot name a folder of the experiment",
            f"use at most 40 letters, digits, '.', '_' and '-', and none of {', '.join(sorted(RESERVED))}",
        )


def _seeds(declared: Any) -> tuple[int, ...]:
    seeds: tuple[int, ...] = _checked(tuple[int, ...], declared, "seeds")
    if not seeds or len(set(seeds)) < len(seeds) or not 0 <= min(seeds) <= max(seeds) <= LARGEST_SEED:
        raise UsageError(
            f"seeds = {list(seeds)} are not different whole numbers from 0 to {LARGEST_SEED}",
            "for example [42, 43, 44]",
        )
    return seeds


def _stages(declared: Mapping[str, Any]) -> tuple[TrainedStage, ...]:
    """In the order in which they follow each other, however the file has them."""
    stages = _checked(tuple[TrainedStage, ...], declared.get("stages", ["base"]), "stages")
    if "base" not in stages:
        raise UsageError("stages leaves out base, which the others follow", 'for example stages = ["base", "sft"]')
    if "eval" in stages and not ({"mid", "sft"} & set(stages) or _examined_tasks(declared)):
        raise UsageError("eval has no tasks to examine with", 'for example [settings.eval] tasks = ["arithmetic"]')
    return tuple(stage for stage in get_args(TrainedStage) if stage in stages)


def _examined_tasks(declared: Mapping[str, Any]) -> Any:
    return _table(_table(declared, "settings", "settings"), "eval", "settings.eval").get("tasks")


def _arms(file: Path, tables: dict[str, Any], shared: dict[str, Any], vocab_size: int) -> dict[str, Arm]:
    if len(tables) < 2:
        raise UsageError(f"{len(tables)} arms leave nothing to compare", "declare two with [arms.NAME]")
    arms = {}
    for name in tables:
        _check_name(name, "arm")
        arms[name] = _arm(file, name, _table(tables, name, f"arms.{name}"), shared)
        # Any horizon will do: a model or batch that cannot be would else be found after hours of preparation.
        base = dataclasses.replace(arms[name].settings.base, num_steps=1)
        make_recipe(base, base_shape(base, vocab_size), 1)
    return arms


def _arm(file: Path, name: str, table: dict[str, Any], shared: dict[str, Any]) -> Arm:
    where = f"arms.{name}"
    _check_keys(table, ("data", "prepare", "differs"), where)
    if ("data" in table) == ("prepare" in table):
        raise UsageError(
            f"{where} needs either data or prepare",
            'name a corpus folder, data = "…", or the commands that make one, prepare = ["nanochat data …"]',
        )
    lines = _checked(tuple[str, ...], table.get("prepare", []), f"{where}.prepare")
    try:
        commands = [shlex.split(line.removeprefix("nanochat ")) for line in lines]
    except ValueError as error:
        raise UsageError(f"{where}.prepare is no command line ({error})", "close its quotes") from None
    for words in commands:
        if words[:1] != ["data"]:
            raise UsageError(f"{where}.prepare has {shlex.join(words)!r}", "give commands that begin: nanochat data")
    if "prepare" in table and not commands:
        raise UsageError(f"{where}.prepare is empty", "name the commands that make its corpus, or data = FOLDER")
    differs = _table(table, "differs", f"{where}.differs")
    own = {
        key: {**shared.get(key, {}), **value} if isinstance(value, dict) else value for key, value in differs.items()
    }
    return Arm(
        name=name,
        data=_path(file, table["data"], f"{where}.data") if "data" in table else None,
        commands=tuple(map(tuple, commands)),
        differs=differs,
        settings=_settings({**shared, **own}, f"{where}.differs" if differs else "settings"),
    )


def _settings(table: dict[str, Any], where: str) -> Settings:
    sections = {name: _table(table, name, f"{where}.{name}") for name in SECTIONS}
    base = {key: value for key, value in table.items() if key not in SECTIONS}
    return Settings(
        _config(TrainBaseConfig, base, where, ELSEWHERE),
        _config(TrainMidConfig, sections["mid"], f"{where}.mid", ELSEWHERE_OF_SECTION),
        _config(TrainSFTConfig, sections["sft"], f"{where}.sft", ELSEWHERE_OF_SECTION),
        _config(EvalConfig, sections["eval"], f"{where}.eval", {}),
    )


def _config(kind: type[Config], table: dict[str, Any], where: str, elsewhere: Mapping[str, str]) -> Config:
    """Make settings of a table, with every value's type checked: TOML tells 1 from "1" and from true."""
    for name in table:
        if name in elsewhere:
            raise UsageError(f"{where}.{name} is not for this table", elsewhere[name])
    hints = get_type_hints(kind)
    _check_keys(table, tuple(name for name in hints if name not in elsewhere), where)
    return kind(**{name: _checked(hints[name], value, f"{where}.{name}") for name, value in table.items()})


def _budget(declared: Any) -> Budget:
    if declared == "smallest":
        return Budget()
    if isinstance(declared, dict) and len(declared) == 1:
        [(kind, amount)] = declared.items()
        is_number = isinstance(amount, int | float) and not isinstance(amount, bool) and 0 < amount < math.inf
        for known in ("epochs", "tokens", "steps"):
            if kind == known and is_number and (known == "epochs" or amount == int(amount)):
                return Budget(known, amount)
    raise UsageError(f"budget is {declared!r}", 'give "smallest", or { tokens = N }, { steps = N } or { epochs = N }')


def _shares(declared: Any, arms: tuple[str, ...], where: str) -> dict[str, float]:
    """Shares by arm that sum to 1; equal ones if none are declared."""
    if not isinstance(declared, dict):
        raise UsageError(f"{where} is {declared!r}", f"give {{ {arms[0]} = 0.5, {arms[1]} = 0.5 }}")
    _check_keys(declared, arms, where)
    shares = {arm: float(_checked(float, declared.get(arm, 0 if declared else 1), f"{where}.{arm}")) for arm in arms}
    total = sum(shares.values())
    if min(shares.values()) < 0 or not 0 < total < math.inf:
        raise UsageError(f"{where} has no positive sum or a negative share", "give every arm 0 or more")
    return {arm: share / total for arm, share in shares.items() if share > 0}


def _path(file: Path, value: Any, where: str) -> Path:
    """A folder, relative to the file that names it."""
    return (file.parent / Path(_checked(str, value, where)).expanduser()).absolute()


def _table(parent: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = parent.get(name, {})
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}", f"make it a table: [{where}]")
    return value


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            place = f"{where}.{name}" if where else name
            raise UsageError(
                f"there is no {place}", f"did you mean {close[0]}" if close else f"choose of {', '.join(known)}"
            )


def _checked(kind: Any, value: Any, where: str) -> Any:
    """The value as that type, or an error that names its place."""
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_checked(get_args(option)[0], item, where) for item in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if option in (int, str, bool) and type(value) is option:
            return value
    choices = [repr(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]
    choices += [TYPE_NAMES[option] for option in options if option in TYPE_NAMES]
    raise UsageError(f"{where} is {value!r}", f"give {' or '.join(choices) or 'a list'}")
