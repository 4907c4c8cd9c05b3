"""What is each part of the recipe worth? Train arms that differ in one thing, and compare bits per byte by seed.

    python benchmarks/ablate.py --arms baseline warmdown_ratio=0.85,final_lr_fraction=0 without=normuon --seeds 42 43 44

An arm is `baseline`, or changes to it joined by commas. A change is one of

- a field of `TrainBaseConfig` or `ScheduleConfig`: `matrix_lr=0.04`, `warmdown_ratio=0.85`, `momentum_start=0.95`;
- `set:MODULE.CONSTANT=NUMBER`, a constant of the package: `set:nanochat.model.loss.LOGIT_CAP=30`;
- `pin:NAME=NUMBER`, parameters of this name held at a number: `pin:smear_lambda=0` is a model without smear;
- `init:NAME=FACTOR`, parameters of this name begin that many times as large: `init:c_fc=2.5`;
- `without=PIECE` of Muon: `normuon`, `muoneq`;
- `batch_ramp=SHARE`: this share of the tokens, the first, in steps of half the batch, and so twice as many of them;
- `window_ramp=SHARE`: this share of the steps, the first, with half of each window;
- `lookahead:NAME=AMOUNT`: gradients are taken where parameters of this name, all without `:NAME`, are ahead of
  themselves by so many of their mean updates (a running mean over ten steps).

Text, tokens, validation rows, steps and, of a seed, initial weights and the order of the data are the baseline's, which
is the demo's recipe. Besides the last weights, those of every arm are scored averaged over the last 10 and 30 % of the
steps, and moved away from the latter average by a tenth of the distance. Each finished training is a line
of --results, and is not repeated: stop it as you like, and give the same command to carry on. Printed are the means
over the seeds and the paired differences to the baseline with their 95 % intervals: negative is better.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanochat.config import DEMO_BASE, TrainBaseConfig
from nanochat.corpus.builtin import build_builtin_corpus
from nanochat.corpus.shards import read_texts
from nanochat.errors import UsageError
from nanochat.experiment.statistics import difference
from nanochat.loader.batches import BatchLoader, MicroBatch
from nanochat.loader.tokenize import tokenize_corpus
from nanochat.optim.muon import NORM_MARGIN, POLAR_EXPRESS_COEFFICIENTS, TINY
from nanochat.optim.schedules import ScheduleConfig, StepSchedule, schedule_at
from nanochat.runtime import Runtime, choose_compute_dtype
from nanochat.tokenizer.train import train_tokenizer
from nanochat.tracking.console import Console
from nanochat.training.base import FIX_TOKENS, build_stage, resolve
from nanochat.training.loop import Cadence, Stage, Trackers, train
from nanochat.training.recipe import base_shape, make_recipe
from nanochat.training.session import TrainingInputs
from nanochat.workspace import Workspace

BASELINE = "baseline"
LAST = "last weights"
AVERAGED_SHARES = (0.1, 0.3)
EXTRAPOLATION = 0.1
EVAL_TOKENS = 32_768
LOOKAHEAD_DECAY = 0.9
INTERVENTIONS = ("set", "pin", "init", "batch_ramp", "window_ramp", "lookahead")


@dataclass(frozen=True)
class Arm:
    """Changes to the baseline, sorted by who makes them."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    others: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read an arm as it stands on the command line.

        Raises:
            argparse.ArgumentTypeError: a change is none that there is.
        """
        arm = cls(name)
        fields = {f.name for f in dataclasses.fields(TrainBaseConfig)}
        shapes = {f.name for f in dataclasses.fields(ScheduleConfig)}
        for change in name.split(",") if name != BASELINE else ():
            what, _, value = change.partition("=")
            kind, _, target = what.partition(":")
            number = _number(value)
            if what in fields:
                arm.config[what] = value if number is None else number
            elif what in shapes and number is not None:
                arm.schedule[what] = number
            elif (what == "without" and value in MUON_PIECES) or (kind in INTERVENTIONS and number is not None):
                arm.others.append((kind, target, value))
            else:
                raise argparse.ArgumentTypeError(f"{change!r} changes nothing; --help says what there is to change")
        return arm

    def numbers(self, kind: str) -> list[tuple[str, float]]:
        """Target and number of each change of a kind."""
        return [(target, float(value)) for found, target, value in self.others if found == kind]


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _unit_scale(direction_Kmn: Tensor) -> Tensor:
    """Factors that leave the rows as they are and set the Frobenius norm: Muon+ without NorMuon."""
    target = min(direction_Kmn.shape[-2:])
    squares_K11 = direction_Kmn.float().square().sum(dim=(-2, -1), keepdim=True)
    factor_K11: Tensor = torch.rsqrt(squares_K11.clamp_min(TINY) / target)
    return factor_K11


def _orthogonalize_as_it_is(update_Kmn: Tensor, work_dtype: torch.dtype) -> Tensor:
    """Polar Express on each matrix as it is, its rows not equilibrated."""
    norm_K11 = torch.linalg.matrix_norm(update_Kmn, keepdim=True).clamp_min(TINY)
    x_Kmn = (update_Kmn / (norm_K11 * NORM_MARGIN)).to(work_dtype)
    is_tall = x_Kmn.size(-2) > x_Kmn.size(-1)
    x_Ksl: Tensor = x_Kmn.mT if is_tall else x_Kmn
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram_Kss = x_Ksl @ x_Ksl.mT
        x_Ksl = a * x_Ksl + (b * gram_Kss + c * gram_Kss @ gram_Kss) @ x_Ksl
    direction_Kmn: Tensor = x_Ksl.mT if is_tall else x_Ksl
    return direction_Kmn


# What stands in for a piece of Muon that is left out.
MUON_PIECES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "normuon": ("nanochat.optim.muon.variance_scale", lambda direction, second_moment, beta2: _unit_scale(direction)),
    "muoneq": ("nanochat.optim.muon.orthogonalize", _orthogonalize_as_it_is),
}


class HalfSteps:
    """A loader that hands out each of the first batches in two halves."""

    def __init__(self, loader: BatchLoader, batches: int) -> None:
        self._loader = loader
        self._halves = 2 * batches
        self._waiting: list[MicroBatch] = []

    def next_step(self) -> list[MicroBatch]:
        """The next half, or batch."""
        if self._halves == 0:
            return self._loader.next_step()
        self._halves -= 1
        if not self._waiting:
            self._waiting = self._loader.next_step()
            middle = len(self._waiting) // 2
            first, self._waiting = self._waiting[:middle], self._waiting[middle:]
            return first
        second, self._waiting = self._waiting, []
        return second

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Tail:
    """Running sums of the weights over the last shares of the steps."""

    def __init__(self, stage: Stage, num_steps: int) -> None:
        self.weights = list(stage.model.parameters())
        self.step = 0
        self.starts = {share: num_steps - max(1, round(share * num_steps)) for share in AVERAGED_SHARES}
        self.means = {share: [torch.zeros_like(weight) for weight in self.weights] for share in AVERAGED_SHARES}

    @torch.no_grad()
    def add(self) -> None:
        """Count the weights as they are."""
        for share, start in self.starts.items():
            if self.step >= start:
                for mean, weight in zip(self.means[share], self.weights, strict=True):
                    mean.lerp_(weight, 1 / (self.step - start + 1))
        self.step += 1

    @torch.no_grad()
    def scores(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Bits per byte of the weights as they are, of the means, and of the opposite of a mean."""
        last = [weight.clone() for weight in self.weights]
        longest = self.means[AVERAGED_SHARES[-1]]
        candidates = {LAST: last} | {f"mean of the last {share:.0%}": mean for share, mean in self.means.items()}
        candidates["away from the mean"] = [a.lerp(b, -EXTRAPOLATION) for a, b in zip(last, longest, strict=True)]
        scores = {}
        for name, candidate in candidates.items():
            self._put(candidate)
            scores[name] = evaluate()["epoch/bpb"]
        self._put(last)
        return scores

    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


def after_update(stage: Stage, work: Callable[[], None]) -> None:
    """Have something done after each update of the weights, as part of it."""
    step = stage.optimizer.step

    def step_and_work(schedule: StepSchedule, is_finite: Tensor | None = None) -> None:
        step(schedule, is_finite)
        work()

    stage.optimizer.step = step_and_work  # type: ignore[method-assign]


def named(stage: Stage, name: str) -> list[torch.nn.Parameter]:
    """The parameters whose name holds `name`.

    Raises:
        UsageError: there are none.
    """
    found = [weight for full_name, weight in stage.model.named_parameters() if name in full_name]
    if not found:
        raise UsageError(f"the model has no parameter named {name!r}", "src/nanochat/model/gpt.py has the names")
    return found


def pin(stage: Stage, name: str, value: float) -> None:
    """Hold the parameters of this name at a value."""
    weights = named(stage, name)

    @torch.no_grad()
    def hold() -> None:
        for weight in weights:
            weight.fill_(value)

    hold()
    after_update(stage, hold)


@torch.no_grad()
def scale_start(stage: Stage, name: str, factor: float) -> None:
    """Multiply the initial parameters of this name."""
    for weight in named(stage, name):
        weight.mul_(factor)


def look_ahead(stage: Stage, name: str, amount: float, num_steps: int) -> None:
    """Leave the parameters of this name ahead by a multiple of their mean update, but for the last step."""
    # Each with where it was, its mean update, and how far ahead it is.
    tracked = [
        (weight, weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight))
        for weight in named(stage, name)
    ]
    steps = itertools.count(1)

    @torch.no_grad()
    def move() -> None:
        reach = amount if next(steps) < num_steps else 0.0
        for weight, before, mean, ahead in tracked:
            weight.sub_(ahead)
            mean.lerp_(weight - before, 1 - LOOKAHEAD_DECAY)
            before.copy_(weight)
            weight.add_(torch.mul(mean, reach, out=ahead))

    after_update(stage, move)


def ramp_windows(stage: Stage, share: float, num_steps: int) -> None:
    """Halve the windows for the first share of the steps."""
    layers = [(block.attn, block.attn.window) for block in stage.model.blocks]
    steps = itertools.count()

    def widen() -> None:
        is_wide = next(steps) >= round(share * num_steps)
        for layer, window in layers:
            layer.window = window if is_wide else window // 2

    widen()
    after_update(stage, widen)


@contextlib.contextmanager
def package_changes(arm: Arm) -> Iterator[None]:
    """The package with an arm's constants, and without the pieces of Muon that it does without."""
    with contextlib.ExitStack() as stack:
        for target, value in arm.numbers("set"):
            stack.enter_context(patch(target, value))
        for kind, _, piece in arm.others:
            if kind == "without":
                stack.enter_context(patch(*MUON_PIECES[piece]))
        yield


def train_arm(arm: Arm, base: TrainBaseConfig, workspace: Workspace, inputs: TrainingInputs) -> dict[str, Any]:
    """Train once: scores by the weights they are of, and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = Runtime(device, choose_compute_dtype(device, "auto"))
    # Shapes change in the middle of some arms, and one process trains all.
    config = dataclasses.replace(base, compile="off", **arm.config)
    console = Console(enabled=False)
    shape = base_shape(config, inputs.tokenizer.vocab_size)
    recipe = make_recipe(config, shape, inputs.train.num_tokens)
    if arm.numbers("batch_ramp"):
        half = recipe.total_batch_size // config.sequence_len // 2
        config = dataclasses.replace(config, device_batch_size=min(config.device_batch_size, half))
    resolved = resolve(config, "ablate", shape, recipe, inputs, runtime)
    with package_changes(arm), tempfile.TemporaryDirectory(dir=workspace.root) as scratch:
        places = dataclasses.replace(workspace, root=Path(scratch))
        stage, _ = build_stage(
            config, shape, recipe, resolved, inputs, {"epoch/bpb": inputs.val}, places, runtime, console
        )
        ramped = sum(round(share * recipe.num_steps) for _, share in arm.numbers("batch_ramp"))
        num_steps = recipe.num_steps + ramped
        schedule_config = dataclasses.replace(
            ScheduleConfig(recipe.warmup_steps, config.warmdown_ratio, config.final_lr_fraction), **arm.schedule
        )

        def schedule(step: int) -> StepSchedule:
            """By the tokens trained on, of which a step of the ramp has half."""
            return schedule_at(max(step // 2, step - ramped), recipe.num_steps, schedule_config)

        loader = HalfSteps(stage.loader, ramped) if ramped else stage.loader
        stage = dataclasses.replace(stage, schedule=schedule, loader=loader, sample=list)  # type: ignore[arg-type]
        for name, value in arm.numbers("init"):
            scale_start(stage, name, value)
        for name, value in arm.numbers("pin"):
            pin(stage, name, value)
        for name, amount in arm.numbers("lookahead"):
            look_ahead(stage, name, amount, num_steps)
        for _, share in arm.numbers("window_ramp"):
            ramp_windows(stage, share, num_steps)
        tail = Tail(stage, num_steps)
        after_update(stage, tail.add)
        scores: dict[str, float] = {}

        def evaluate() -> dict[str, float]:
            scores.update(tail.scores(stage_evaluate))
            return {"epoch/bpb": scores[LAST]}

        stage_evaluate = stage.evaluate
        stage = dataclasses.replace(stage, evaluate=evaluate)
        cadence = Cadence(num_steps, num_steps, 0, 0, 0, 2)
        result = train(stage, cadence, runtime, Trackers(console))
        stage.loader.close()
    return {"scores": scores, "seconds": round(result.progress.seconds, 1), "skipped": result.progress.skipped_steps}


def prepare(workspace: Workspace, vocab_size: int) -> TrainingInputs:
    """The built-in corpus as tokens, made once."""
    if not (workspace.tokens / "manifest.json").exists():
        build_builtin_corpus(workspace.base_data)
        texts = read_texts(workspace.base_data, "train", "run the benchmark again")
        train_tokenizer(texts, vocab_size=vocab_size, max_chars=200_000_000).save(workspace.tokenizer)
        tokenize_corpus(workspace.base_data, workspace.tokenizer, workspace.tokens, workers=1)
    return TrainingInputs.open(workspace, workspace.tokens, FIX_TOKENS)


def report(lines: list[dict[str, Any]], arms: list[str]) -> None:
    """Print, for each depth, every arm's mean and its paired difference to the baseline's last weights."""
    for depth in sorted({line["depth"] for line in lines}):
        here = [line for line in lines if line["depth"] == depth]
        reference = {line["seed"]: line["scores"][LAST] for line in here if line["arm"] == BASELINE}
        print(f"\ndepth {depth}: bits per byte, difference to the baseline (* excludes 0)")
        for arm in arms:
            trainings = [line for line in here if line["arm"] == arm]
            for weights in trainings[0]["scores"] if trainings and reference else ():
                values = {line["seed"]: line["scores"][weights] for line in trainings if line["seed"] in reference}
                if not values:
                    continue
                # Of the same seeds only: one seed beside the mean of three would be compared with the others' luck.
                gain = difference(values, {seed: reference[seed] for seed in values})
                label = arm if weights == LAST else f"  {weights}"
                half_width = "" if gain.half_width is None else f" ± {gain.half_width:.4f}{' *' * gain.excludes_zero}"
                print(f"{label:52}{statistics.mean(values.values()):8.4f}  {gain.mean:+.4f}{half_width}")
            if trainings:
                seconds = statistics.mean(line["seconds"] for line in trainings)
                print(f"  seeds: {len(trainings)}, {seconds:.0f} s each")


def main() -> None:
    """Train what is not in the results yet, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Arm.parse, nargs="+", default=[], help="baseline, or changes joined by commas")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 4], help="layers (default: 3 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="seeds (default: 42 43 44)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default: 150)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step (default: 4096)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "nanochat-ablate"), help="of tokens")
    parser.add_argument("--results", type=Path, help="a line of JSON per training (default: in the folder)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, print what there is")
    flags = parser.parse_args()
    arms = list({arm.name: arm for arm in (Arm(BASELINE), *flags.arms)}.values())
    workspace = Workspace(flags.folder / f"v{flags.vocab_size}")
    results = flags.results or flags.folder / "results.jsonl"
    setting = {"steps": flags.steps, "batch_tokens": flags.batch_tokens, "vocab_size": flags.vocab_size}
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    lines = [line for line in lines if line["setting"] == setting]
    if not flags.report_only:
        inputs = prepare(workspace, flags.vocab_size)
        done = {(line["arm"], line["depth"], line["seed"]) for line in lines}
        for seed, arm, depth in ((s, a, d) for s in flags.seeds for a in arms for d in flags.depths):
            if (arm.name, depth, seed) in done:
                continue
            base = dataclasses.replace(
                DEMO_BASE,
                depth=depth,
                num_steps=flags.steps,
                total_batch_size=flags.batch_tokens,
                eval_tokens=EVAL_TOKENS,
                seed=seed,
            )
            outcome = train_arm(arm, base, workspace, inputs)
            line = {"arm": arm.name, "depth": depth, "seed": seed, "setting": setting, **outcome}
            lines.append(line)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {arm.name} d{depth} s{seed} {outcome['scores'][LAST]:.4f}", flush=True)
    report(lines, [arm.name for arm in arms])


if __name__ == "__main__":
    main()
