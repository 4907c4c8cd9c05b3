"""A small evaluation bundle in the layout of the real one."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from examinees import byte_tokenizer, random_model

from nanochat.config import Variant
from nanochat.model.generate import generate
from nanochat.model.gpt import GPT

TOKENIZER = byte_tokenizer()
WORDS = ("north", "northern wind", "süd", "wester ", "east", "café ☕", "a b", "Ωmega", "no", "not", " x")


def letters_only(variant: Variant = "modern") -> GPT:
    """A random model that says lower-case letters only, so that what it says is a text with one encoding."""
    model = random_model(TOKENIZER, variant=variant)
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(TOKENIZER.vocab_size) if not 97 <= token < 123]] = 0
    return model


def write_bundle(folder: Path) -> Path:
    """A small bundle with every type of task, with and without examples, Unicode, shared prefixes and long texts."""
    draw = random.Random(0)
    models = [letters_only("modern"), letters_only("classic")]

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def choice(longest: int) -> dict[str, Any]:
        options = draw.sample(WORDS, draw.choice([2, 3, 4]))
        return {
            "query": words(draw.randint(1, longest)) + draw.choice(["", " "]),
            "choices": options,
            "gold": draw.randrange(len(options)),
        }

    def schema() -> dict[str, Any]:
        first, second = draw.sample(WORDS, 2)
        before = words(2)
        return {
            "context_options": [f"{before} {first}", f"{before} {second}"],
            "continuation": words(3),
            "gold": draw.randrange(2),
        }

    def language(index: int) -> dict[str, Any]:
        context = words(draw.randint(1, 6))
        prompt = [TOKENIZER.bos_id, *TOKENIZER.encode(context.strip())]
        said = TOKENIZER.decode(generate(models[index % 2], prompt, 3))
        return {"context": f" {context} ", "continuation": words(1).strip() if index % 5 == 0 else said}

    tasks: dict[str, tuple[str, int, str | None, float, list[dict[str, Any]]]] = {
        "choice_zero": ("multiple_choice", 0, None, 25, [choice(3) for _ in range(30)]),
        "choice_two": ("multiple_choice", 2, "\nAnswer: ", 40.3, [choice(4) for _ in range(25)]),
        "choice_long": ("multiple_choice", 1, None, 25, [choice(40) for _ in range(12)]),
        "schema": ("schema", 0, None, 50, [schema() for _ in range(30)]),
        "schema_one": ("schema", 1, None, 50, [schema() for _ in range(15)]),
        "language": ("language_modeling", 0, "", 0, [language(index) for index in range(30)]),
        "language_three": ("language_modeling", 3, None, 0, [language(index) for index in range(12)]),
    }
    data = folder / "eval_bundle" / "eval_data" / "some" / "folder"
    data.mkdir(parents=True)
    listed = []
    for label, (task_type, examples, delimiter, _, items) in tasks.items():
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (data / f"{label}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        entry = {"label": label, "dataset_uri": f"some/folder/{label}.jsonl", "num_fewshot": [examples]}
        optional = {} if delimiter is None else {"continuation_delimiter": delimiter}
        listed.append({**entry, "icl_task_type": task_type, **optional})
    (folder / "eval_bundle" / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listed}))
    with (folder / "eval_bundle" / "eval_meta_data.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Eval Task", "Task Category", "Task Type", "#shots", "#datapoints", "Random baseline"])
        writer.writerows([label, "made up", task[0], task[1], len(task[4]), task[3]] for label, task in tasks.items())
    return folder / "eval_bundle"
