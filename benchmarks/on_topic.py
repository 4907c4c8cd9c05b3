"""Whether a chat model answers what was asked: held-out questions about the standard library, stage against stage.

    python benchmarks/on_topic.py ~/.cache/nanochat/demo

Each stage's model is asked `What does … do?` about objects that no stage has trained on. Two things are counted:

in the format   the answer ends by itself, with <|assistant_end|>, and holds no other special token
on topic        it shares more words with the documentation of the object asked about than with that of the
                average other object. Guessing, or always saying the same, is on topic half of the time. An answer
                that is out of the format is not on topic: nobody would read it

The share of words is F1 over distinct lower-case words. Intervals are 95 % (Wilson).
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.chat.engine import Engine, Sampling
from nanochat.checkpoint.trained_model import TrainedModel, load_trained_model
from nanochat.evaluation.statistics import Score
from nanochat.runtime import start_runtime
from nanochat.tasks.registry import open_task
from nanochat.tasks.task import Problem
from nanochat.tokenizer.conversation import render_prompt
from nanochat.tracking.console import Console
from nanochat.workspace import Stage, Workspace

STAGES: tuple[Stage, ...] = ("base", "mid", "sft")
MAX_NEW_TOKENS = 64


def words(text: str) -> frozenset[str]:
    """The distinct words of a text, in lower case."""
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def word_f1(first: frozenset[str], second: frozenset[str]) -> float:
    """How much two texts share, 0 to 1: the harmonic mean of precision and recall over distinct words."""
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 0.0


def is_on_topic(answer: str, index: int, references: Sequence[frozenset[str]]) -> bool:
    """Whether an answer is nearer to its own reference than to the others on average."""
    said = words(answer)
    others = [word_f1(said, other) for place, other in enumerate(references) if place != index]
    return word_f1(said, references[index]) > sum(others) / len(others)


def examine(trained: TrainedModel, problems: Sequence[Problem]) -> dict[str, Score]:
    """Ask every question and count."""
    tokenizer = trained.tokenizer
    special = set(tokenizer.special_ids.values())
    prompts = [render_prompt(tokenizer, problem.conversation.messages[:-1]) for problem in problems]
    answers = Engine(trained.model, tokenizer).generate(prompts, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    references = [words(problem.answer) for problem in problems]
    in_format = [0 < len(answer) < MAX_NEW_TOKENS and not special & set(answer) for answer in answers]
    on_topic = [
        formed and is_on_topic(tokenizer.decode(answer), index, references)
        for index, (answer, formed) in enumerate(zip(answers, in_format, strict=True))
    ]
    n = len(problems)
    return {"in the format": Score(n, sum(in_format), 0.0), "on topic": Score(n, sum(on_topic), 0.5)}


def main() -> None:
    """Print a table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="of a finished demo or speedrun with the task `library`")
    parser.add_argument("--questions", type=int, default=400)
    arguments = parser.parse_args()
    workspace = Workspace(arguments.workspace)
    problems = open_task("library", workspace.task_data).problems("test")[: arguments.questions]
    results: dict[str, dict[str, Score]] = {}
    print(f"{len(problems)} held-out questions\n\n| stage | in the format | on topic |\n|---|---:|---:|")
    with start_runtime() as runtime:
        for stage in STAGES:
            results[stage] = examine(load_trained_model(workspace, stage, None, runtime, Console()), problems)
            cells = [f"{s.accuracy:.1%} [{s.low:.1%}, {s.high:.1%}]" for s in results[stage].values()]
            print(f"| {stage.upper()} | {' | '.join(cells)} |")
    print(json.dumps({stage: {name: s.as_json() for name, s in scores.items()} for stage, scores in results.items()}))


if __name__ == "__main__":
    main()
