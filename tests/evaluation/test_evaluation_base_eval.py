"""Measuring a base model: the rows of training, and CORE only where its problems are."""

import io
import json

import pytest
from bundles import write_bundle
from examinees import CPU, as_trained, byte_tokenizer, random_model

from nanochat.errors import DataError, UsageError
from nanochat.evaluation.base_eval import evaluate_base
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.evaluation.core import evaluate_core, read_bundle
from nanochat.loader.batches import validation_rows
from nanochat.loader.token_shards import TokenDataset
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.tracking.console import Console
from nanochat.workspace import Workspace


def test_bits_per_byte_are_measured_without_a_bundle_and_it_says_how_to_get_one(prepared_workspace: Workspace) -> None:
    tokenizer, shown = Tokenizer.load(prepared_workspace.tokenizer), io.StringIO()
    model = random_model(tokenizer, sequence_len=32)
    content = evaluate_base(
        as_trained(model, tokenizer, eval_tokens=320), prepared_workspace, CPU, console=Console(stream=shown)
    )
    rows = validation_rows(TokenDataset.open(prepared_workspace.tokens, "val"), 32, 10)
    assert content["epoch/bpb"] == pytest.approx(bits_per_byte(model, rows, tokenizer.token_bytes(), CPU, 3), rel=1e-6)
    assert content["core"] is None
    assert f"no CORE: {prepared_workspace.eval_bundle} is missing — nanochat stage core" in shown.getvalue()


def test_core_is_measured_where_the_bundle_is(prepared_workspace: Workspace) -> None:
    write_bundle(prepared_workspace.root)
    tokenizer = Tokenizer.load(prepared_workspace.tokenizer)
    model = random_model(tokenizer)
    content = evaluate_base(as_trained(model, tokenizer, eval_tokens=320), prepared_workspace, CPU, max_per_task=3)
    tasks = read_bundle(prepared_workspace.eval_bundle)
    assert content["core"] == evaluate_core(model, tokenizer, tasks, CPU, max_per_task=3).as_json()
    written = json.loads((prepared_workspace.evaluations("sft", "tiny") / "step_000003_base.json").read_text())
    assert written["core"] == content["core"]
    assert written["config"] == {"max_per_task": 3}


def test_tokens_of_another_tokenizer_are_refused(prepared_workspace: Workspace) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(DataError, match="nanochat data tokenize"):
        evaluate_base(as_trained(random_model(tokenizer), tokenizer, eval_tokens=320), prepared_workspace, CPU)


@pytest.mark.parametrize("options", [{"max_per_task": 0}, {"batch_size": -1}])
def test_counts_that_examine_nothing_are_refused(prepared_workspace: Workspace, options: dict[str, int]) -> None:
    tokenizer = Tokenizer.load(prepared_workspace.tokenizer)
    with pytest.raises(UsageError, match="1 or more"):
        evaluate_base(as_trained(random_model(tokenizer), tokenizer), prepared_workspace, CPU, **options)
