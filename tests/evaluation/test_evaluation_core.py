"""CORE: against a slow reference that takes one prompt at a time, on a bundle in the real layout."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from bundles import TOKENIZER, letters_only, write_bundle
from examinees import CPU, rank_runtime

from distributed import run_distributed
from nanochat.config import Variant
from nanochat.errors import DataError
from nanochat.evaluation.core import CoreResult, common_prefix, evaluate_core, read_bundle, scored_sequences
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tokenizer.train import train_tokenizer
from texts import small_texts


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("core"))


def reference(bundle: Path, variant: Variant, max_per_task: int | None = None) -> dict[str, tuple[int, int]]:
    """The rules, without batches, one task, problem and text after the other: (correct, n) by task."""
    model = letters_only(variant)
    context = model.config.sequence_len

    def scored(ids: list[int], start: int) -> tuple[float, bool]:
        cut = max(0, len(ids) - context - 1)
        ids, start = ids[cut:], max(1, start - cut)
        log_probabilities = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], dim=-1)
        losses = [-log_probabilities[i - 1, ids[i]].item() for i in range(start, len(ids))]
        greedy = [int(log_probabilities[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
        return sum(losses) / len(losses), all(greedy)

    def shared(left: list[int], right: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))

    results = {}
    for entry in yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]:
        lines = (bundle / "eval_data" / entry["dataset_uri"]).read_text().splitlines()
        items = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(items)
        delimiter = entry.get("continuation_delimiter", " ")
        correct, n = 0, min(len(items), max_per_task or len(items))
        for index in range(n):
            others = [other for other in range(len(items)) if other != index]
            examples = [items[i] for i in random.Random(1234 + index).sample(others, entry["num_fewshot"][0])]
            item = items[index]
            if entry["icl_task_type"] == "multiple_choice":
                solved = [e["query"] + delimiter + e["choices"][e["gold"]] for e in examples]
                texts = ["\n\n".join([*solved, item["query"] + delimiter + option]) for option in item["choices"]]
            elif entry["icl_task_type"] == "schema":
                solved = [e["context_options"][e["gold"]] + delimiter + e["continuation"] for e in examples]
                options = [option + delimiter + item["continuation"] for option in item["context_options"]]
                texts = ["\n\n".join([*solved, option]) for option in options]
            else:
                solved = [e["context"].strip() + delimiter + e["continuation"] for e in examples]
                without = "\n\n".join([*solved, item["context"].strip() + delimiter])
                texts = [without + item["continuation"]]
            sequences = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in texts]
            if entry["icl_task_type"] == "language_modeling":
                correct += scored(sequences[0], 1 + len(TOKENIZER.encode(without.strip())))[1]
                continue
            if entry["icl_task_type"] == "multiple_choice":
                start = min(shared(sequences[0], other) for other in sequences[1:])
                # Where a choice is the beginning of all others, its last token still counts.
                starts = [min(start, len(sequence) - 1) for sequence in sequences]
            else:
                suffix = min(shared(sequences[0][::-1], other[::-1]) for other in sequences[1:])
                starts = [len(sequence) - suffix for sequence in sequences]
            losses = [scored(sequence, start)[0] for sequence, start in zip(sequences, starts)]
            correct += losses.index(min(losses)) == item["gold"]
        results[entry["label"]] = (correct, n)
    return results


def counts(result: CoreResult) -> dict[str, tuple[int, int]]:
    return {label: (score.correct, score.n) for label, score in result.tasks.items()}


@pytest.mark.parametrize("variant", ["modern", "classic"])
def test_it_is_what_the_rules_say_for_every_type_of_task(bundle: Path, variant: Variant) -> None:
    expected = reference(bundle, variant)
    assert counts(evaluate_core(letters_only(variant), TOKENIZER, read_bundle(bundle), CPU)) == expected
    # Or the comparison would say little.
    assert 0 < expected["language"][0] < 30
    assert all(0 < correct < n for label, (correct, n) in expected.items() if "language" not in label)


@pytest.mark.parametrize("batch_size", [1, 5, 200])
def test_it_does_not_depend_on_the_batch(bundle: Path, batch_size: int) -> None:
    tasks = read_bundle(bundle)
    small, default = (
        evaluate_core(letters_only(), TOKENIZER, tasks, CPU, batch_size=size) for size in (batch_size, 16)
    )
    assert small == default


def on_a_rank(bundle: Path) -> CoreResult:
    return evaluate_core(letters_only(), TOKENIZER, read_bundle(bundle), rank_runtime(), batch_size=4)


def test_it_does_not_depend_on_the_number_of_ranks(bundle: Path) -> None:
    alone = evaluate_core(letters_only(), TOKENIZER, read_bundle(bundle), CPU, batch_size=4)
    assert run_distributed(on_a_rank, 2, bundle) == [alone] * 2


def test_a_part_is_a_sample_of_the_whole_with_the_same_examples(bundle: Path) -> None:
    part = evaluate_core(letters_only(), TOKENIZER, read_bundle(bundle), CPU, max_per_task=2)
    assert counts(part) == reference(bundle, "modern", 2)
    assert {score.n for score in part.tasks.values()} == {2}


def test_core_is_the_mean_centred_accuracy_with_the_baselines_of_the_bundle(bundle: Path) -> None:
    result = evaluate_core(letters_only(), TOKENIZER, read_bundle(bundle), CPU)
    percent = {"choice_two": 40.3, "choice_zero": 25, "choice_long": 25, "schema": 50, "schema_one": 50}
    centred = [
        (correct / n - 0.01 * percent.get(label, 0)) / (1 - 0.01 * percent.get(label, 0))
        for label, (correct, n) in counts(result).items()
    ]
    assert result.core == pytest.approx(sum(centred) / 7)
    assert 0 < result.error < 0.1
    assert json.loads(json.dumps(result.as_json()))["tasks"]["schema"]["chance"] == 0.5


@pytest.fixture(scope="module")
def merging_tokenizer() -> Tokenizer:
    return train_tokenizer(small_texts(), vocab_size=320, max_chars=10**6)


def test_what_is_scored_begins_where_the_texts_part(bundle: Path, merging_tokenizer: Tokenizer) -> None:
    for task in read_bundle(bundle):
        for index, item in enumerate(task.items):
            sequences = scored_sequences(merging_tokenizer, task, index, 10**6)
            scored = [merging_tokenizer.decode(sequence.ids[sequence.start :]) for sequence in sequences]
            assert all(scored)
            if task.task_type == "language_modeling":
                text = f"{task.delimiter}{item['continuation']}"
                assert scored == [text]
            elif task.task_type == "schema":
                assert len(set(scored)) == 1
                assert scored[0].endswith(item["continuation"])
            else:
                assert all(option.endswith(part[-1:]) for option, part in zip(item["choices"], scored))


def test_a_text_that_is_too_long_keeps_its_end(bundle: Path) -> None:
    task = next(task for task in read_bundle(bundle) if task.label == "choice_long")
    whole, cut = (scored_sequences(TOKENIZER, task, 0, limit) for limit in (10**6, 20))
    assert all(len(sequence.ids) == 20 for sequence in cut)
    for long, short in zip(whole, cut):
        assert short.ids == long.ids[-20:]
        assert long.ids[long.start :][-19:] == short.ids[short.start :]


def test_a_common_prefix_ends_at_the_first_difference_or_the_shortest_end() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1, 2], [1, 2]]) == 2
    assert common_prefix([[1], [2]]) == 0


def truncate(bundle: Path) -> None:
    path = bundle / "eval_data" / "some" / "folder" / "schema.jsonl"
    path.write_text(path.read_text()[:-20])


def forget_baseline(bundle: Path) -> None:
    path = bundle / "eval_meta_data.csv"
    path.write_text(path.read_text().replace("schema_one", "schema_two"))


def leave_one_item(bundle: Path) -> None:
    path = bundle / "eval_data" / "some" / "folder" / "choice_two.jsonl"
    path.write_text(path.read_text().splitlines()[0])


def point_outside(bundle: Path) -> None:
    path = bundle / "eval_data" / "some" / "folder" / "choice_zero.jsonl"
    path.write_text(path.read_text() + '{"query": "q", "choices": ["a", "b"], "gold": 2}\n')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"schema\.jsonl line 30 is no problem of type schema"),
        (forget_baseline, "is not an evaluation bundle .*schema_one"),
        (leave_one_item, "holds 1 problems, too few to show 2 examples"),
        (point_outside, r"choice_zero\.jsonl line 31 is no problem"),
        (
            lambda bundle: (bundle / "core.yaml").unlink(),
            "core.yaml is missing — bring it where there is network: nanochat stage core",
        ),
        (lambda bundle: (bundle / "core.yaml").write_text("icl_tasks: [}"), "is not an evaluation bundle"),
        (lambda bundle: (bundle / "core.yaml").write_text("icl_tasks"), "is not an evaluation bundle"),
    ],
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    bundle = write_bundle(tmp_path)
    damage(bundle)
    with pytest.raises(DataError, match=message) as caught:
        read_bundle(bundle)
    assert "\n" not in str(caught.value)
