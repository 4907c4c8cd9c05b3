"""What a base model knows: bits per byte of the validation text, and CORE where its problems are there."""

from typing import Any

from nanochat.checkpoint.trained_model import TrainedModel
from nanochat.errors import DataError
from nanochat.evaluation.bits_per_byte import bits_per_byte
from nanochat.evaluation.core import evaluate_core, read_bundle
from nanochat.evaluation.results import write_results
from nanochat.evaluation.sharing import check_positive
from nanochat.evaluation.statistics import score_table
from nanochat.files import read_manifest
from nanochat.loader.batches import validation_rows
from nanochat.loader.token_shards import MANIFEST_KIND as TOKENS_KIND
from nanochat.loader.token_shards import TOKENIZE_COMMAND, TokenDataset
from nanochat.runtime import Runtime, run_on_main
from nanochat.tracking.console import Console
from nanochat.workspace import Workspace


def validation_bits_per_byte(trained: TrainedModel, workspace: Workspace, runtime: Runtime, batch_size: int) -> float:
    """Bits per byte of the rows that the model was validated on during pretraining.

    Raises:
        DataError: the tokens are missing, damaged, or made with another tokenizer than the model's.
    """
    made_with = read_manifest(workspace.tokens, TOKENS_KIND, TOKENIZE_COMMAND)["tokenizer"]["fingerprint"]
    if made_with != trained.tokenizer.fingerprint:
        raise DataError(
            f"{workspace.tokens} was made with tokenizer {made_with}, the model with {trained.tokenizer.fingerprint}",
            TOKENIZE_COMMAND,
        )
    val = TokenDataset.open(workspace.tokens, "val")
    sequence_len = trained.model.config.sequence_len
    rows = validation_rows(val, sequence_len, max(1, trained.config["eval_tokens"] // sequence_len))
    return bits_per_byte(trained.model, rows, trained.tokenizer.token_bytes(), runtime, batch_size)


def evaluate_base(
    trained: TrainedModel,
    workspace: Workspace,
    runtime: Runtime,
    *,
    batch_size: int = 16,
    max_per_task: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a base checkpoint, write the results beside those of other checkpoints, and show them.

    Args:
        batch_size: texts per forward pass on one device.
        max_per_task: of each CORE task at most this many problems.
        console: shows how far it is, and the results.

    Returns:
        What the file holds but for what names the checkpoint: `config`, `epoch/bpb`, and `core` as of
        `CoreResult.as_json`, or None where the workspace has no evaluation bundle.

    Raises:
        DataError: the tokens or the bundle are damaged.
        UsageError: a count is below 1.
    """
    check_positive(batch_size=batch_size, max_per_task=max_per_task)
    console = console or Console(enabled=False)
    # The bundle is read first: what is wrong with it should not be found out after minutes of work.
    tasks = read_bundle(workspace.eval_bundle) if workspace.eval_bundle.is_dir() else []
    bpb = validation_bits_per_byte(trained, workspace, runtime, batch_size)
    console.info(f"validation bits per byte {bpb:.4f}")
    content: dict[str, Any] = {"config": {"max_per_task": max_per_task}, "epoch/bpb": bpb, "core": None}
    if tasks:
        result = evaluate_core(
            trained.model,
            trained.tokenizer,
            tasks,
            runtime,
            batch_size=batch_size,
            max_per_task=max_per_task,
            console=console,
        )
        content["core"] = result.as_json()
        console.info(score_table(result.tasks))
        console.info(f"CORE {result.core:.4f} ± {result.error:.4f} (standard error)")
    else:
        console.info(f"no CORE: {workspace.eval_bundle} is missing — nanochat stage core")
    console.info(str(run_on_main(lambda: write_results(workspace, trained, "base", content))))
    return content
