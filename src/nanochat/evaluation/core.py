"""CORE: 22 tasks that tell base models apart early, after DCLM (arXiv 2406.11794), computed as nanochat does.

Each task is one of three types. *Multiple choice*: which of several continuations of a question is likeliest, by the
mean loss of its tokens from the first on in which the choices differ. *Schema*: which of several contexts makes one
continuation likeliest, by the mean loss of the tokens that all of them end in. *Language modelling*: is the expected
continuation, token by token, what the model would have said? CORE is the mean of their centred accuracies.

The problems of a task, their order and the examples that precede each problem are nanochat's, so that the value
compares with published ones. One thing differs where fewer problems are asked for: examples are drawn from all of a
task, not from the problems left, so that a part is a sample of the whole (karpathy/nanochat#550).

The bundle's `eval_meta_data.csv` says how good guessing is. DCLM corrected some of these numbers in 2025 (dclm#114);
nanochat's bundle, and with it GPT-2's 0.256525, has the earlier ones.
"""

import csv
import functools
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import yaml

from nanochat.errors import DataError
from nanochat.evaluation.sharing import answer_all, right_padded
from nanochat.evaluation.statistics import Score, mean_centred
from nanochat.model.gpt import GPT
from nanochat.model.loss import softcap
from nanochat.runtime import Runtime
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console

CORE_NAME = "core.yaml"
BASELINES_NAME = "eval_meta_data.csv"
DATA_NAME = "eval_data"

# nanochat's: the order of a task's problems, and the examples before problem number i of that order.
ORDER_SEED = 1337
EXAMPLES_SEED = 1234

# Positions whose logits are held at once.
LOGITS_ROWS = 1024

TaskType = Literal["multiple_choice", "schema", "language_modeling"]
# What a line of a task's file holds; `gold` is the index of the right choice or context.
KEYS: dict[TaskType, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


@dataclass(frozen=True)
class CoreTask:
    """One task with all its problems, in the order of evaluation.

    Attributes:
        label: its name.
        task_type: how it is scored.
        num_examples: solved problems that precede each problem.
        delimiter: what stands between context and continuation.
        chance: the accuracy of guessing, 0 to 1.
        items: the problems, as in the task's file.
    """

    label: str
    task_type: TaskType
    num_examples: int
    delimiter: str
    chance: float
    items: list[dict[str, Any]]

    def texts(self, index: int) -> list[str]:
        """One text per choice or context of a problem, examples first; of language modelling with the continuation."""
        item, delimiter, before = self.items[index], self.delimiter, self._examples(index)
        if self.task_type == "multiple_choice":
            return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
        if self.task_type == "schema":
            return [f"{before}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
        return [f"{self.bare_text(index)}{item['continuation']}"]

    def bare_text(self, index: int) -> str:
        """A problem of language modelling without its continuation."""
        return f"{self._examples(index)}{self.items[index]['context'].strip()}{self.delimiter}"

    def length(self, index: int) -> int:
        """How long a problem's texts are together, in characters."""
        return sum(map(len, self.texts(index)))

    def _examples(self, index: int) -> str:
        """The solved problems before a problem: others of the task, drawn by its index."""
        others = random.Random(EXAMPLES_SEED + index).sample(range(len(self.items) - 1), self.num_examples)
        return "".join(f"{self._solved(self.items[other + (other >= index)])}\n\n" for other in others)

    def _solved(self, item: dict[str, Any]) -> str:
        if self.task_type == "multiple_choice":
            return f"{item['query']}{self.delimiter}{item['choices'][item['gold']]}"
        if self.task_type == "schema":
            return f"{item['context_options'][item['gold']]}{self.delimiter}{item['continuation']}"
        return f"{item['context'].strip()}{self.delimiter}{item['continuation']}"


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids, of which those from `start` on are scored; `start` is at least 1."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class CoreResult:
    """CORE, its standard error, and the score of each task."""

    core: float
    error: float
    tasks: dict[str, Score]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        tasks = {label: score.as_json() for label, score in self.tasks.items()}
        return {"core": self.core, "core_error": self.error, "tasks": tasks}


def read_bundle(bundle: Path) -> list[CoreTask]:
    """Read and check all tasks of an evaluation bundle.

    Raises:
        DataError: something is missing, damaged or of another form.
    """
    fix = "bring it where there is network: nanochat stage core"
    try:
        listed = yaml.safe_load((bundle / CORE_NAME).read_text(encoding="utf-8"))["icl_tasks"]
        with (bundle / BASELINES_NAME).open(encoding="utf-8", newline="") as stream:
            percent = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(stream)}
        return [
            CoreTask(
                label=entry["label"],
                task_type=entry["icl_task_type"],
                num_examples=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                chance=percent[entry["label"]] / 100,
                items=_read_items(
                    bundle / DATA_NAME / entry["dataset_uri"], entry["icl_task_type"], entry["num_fewshot"][0], fix
                ),
            )
            for entry in listed
        ]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing", fix) from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{bundle} is not an evaluation bundle ({error!r})", fix) from None


def _read_items(path: Path, task_type: TaskType, num_examples: int, fix: str) -> list[dict[str, Any]]:
    if task_type not in get_args(TaskType):
        raise ValueError(f"unknown task type {task_type!r}")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            options = next((item[key] for key in ("choices", "context_options") if key in KEYS[task_type]), [""])
            ok = all(isinstance(item[key], kind) for key, kind in KEYS[task_type].items())
            ok = ok and 0 <= item.get("gold", 0) < len(options) and item.get("continuation") != ""
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            ok = False
        if not ok:
            raise DataError(f"{path} line {number} is no problem of type {task_type}", fix)
        items.append(item)
    if len(items) <= num_examples:
        raise DataError(f"{path} holds {len(items)} problems, too few to show {num_examples} examples", fix)
    random.Random(ORDER_SEED).shuffle(items)
    return items


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[CoreTask],
    runtime: Runtime,
    *,
    batch_size: int = 16,
    max_per_task: int | None = None,
    console: Console | None = None,
) -> CoreResult:
    """Score a model on all tasks, over all ranks.

    Args:
        batch_size: texts per forward pass on one device.
        max_per_task: of each task only the first this many problems, which are a uniform sample. The value is then an
            estimate of CORE, with a larger standard error.
        console: shows how far it is.
    """
    scores = {}
    for task in tasks:
        count = min(len(task.items), max_per_task or len(task.items))
        correct = answer_all(
            range(count),
            task.length,
            functools.partial(judge_items, model, tokenizer, task, batch_size),
            runtime,
            batch_size,
            console=console or Console(enabled=False),
            description=task.label,
        )
        scores[task.label] = Score(count, sum(correct), task.chance)
    return CoreResult(*mean_centred(scores.values()), scores)


def judge_items(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, batch_size: int, indices: Sequence[int]
) -> list[bool]:
    """Whether the model solves these problems of a task; of two choices alike the earlier one is taken."""
    max_tokens = model.config.sequence_len + 1
    sequences = {index: scored_sequences(tokenizer, task, index, max_tokens) for index in indices}
    flat = [sequence for texts in sequences.values() for sequence in texts]
    outcomes = iter(
        [
            outcome
            for start in range(0, len(flat), batch_size)
            for outcome in score_sequences(model, flat[start : start + batch_size])
        ]
    )
    verdicts = []
    for index, texts in sequences.items():
        losses, are_likeliest = zip(*itertools.islice(outcomes, len(texts)), strict=True)
        if task.task_type == "language_modeling":
            verdicts.append(are_likeliest[0])
        else:
            verdicts.append(losses.index(min(losses)) == task.items[index]["gold"])
    return verdicts


def scored_sequences(tokenizer: Tokenizer, task: CoreTask, index: int, max_tokens: int) -> list[ScoredSequence]:
    """A problem's texts as tokens, BOS first, and where in each the scored ones begin.

    At least one token is scored, and never the first of all, which nothing predicts. What is too long loses its
    beginning.
    """
    sequences = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in task.texts(index)]
    if task.task_type == "language_modeling":
        # Without the space before the continuation, which is part of the continuation's first token.
        bare = [tokenizer.bos_id, *tokenizer.encode(task.bare_text(index).rstrip())]
        starts = [common_prefix([*sequences, bare])]
    elif task.task_type == "multiple_choice":
        starts = [common_prefix(sequences)] * len(sequences)
    else:
        suffix = common_prefix([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - suffix for sequence in sequences]
    scored = []
    for ids, start in zip(sequences, starts, strict=True):
        cut = max(0, len(ids) - max_tokens)
        scored.append(ScoredSequence(ids[cut:], min(max(1, start - cut), len(ids) - cut - 1)))
    return scored


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


@torch.no_grad()
def score_sequences(model: GPT, sequences: Sequence[ScoredSequence]) -> list[tuple[float, bool]]:
    """For each sequence the mean loss of its scored tokens in nats, and whether each of them is the likeliest.

    The head is applied in float32, to scored positions only: all logits of a batch would fill a GPU.
    """
    device = model.lm_head.weight.device
    hidden_BTC = model.hidden_states(right_padded([sequence.ids[:-1] for sequence in sequences], device))
    lengths = [len(sequence.ids) - sequence.start for sequence in sequences]
    hidden_NC = torch.cat([hidden_BTC[row, s.start - 1 : len(s.ids) - 1] for row, s in enumerate(sequences)])
    targets_N = torch.tensor([token for s in sequences for token in s.ids[s.start :]], device=device)
    losses, likeliest = [], []
    for chunk_NC, targets in zip(torch.split(hidden_NC, LOGITS_ROWS), torch.split(targets_N, LOGITS_ROWS), strict=True):
        logits_NV = softcap(F.linear(chunk_NC.float(), model.lm_head.weight))
        losses += F.cross_entropy(logits_NV, targets, reduction="none").tolist()
        likeliest += (logits_NV.argmax(dim=-1) == targets).tolist()
    outcomes, start = [], 0
    for length in lengths:
        outcomes.append((math.fsum(losses[start : start + length]) / length, all(likeliest[start : start + length])))
        start += length
    return outcomes
