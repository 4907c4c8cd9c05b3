"""Text and conversations: from their sources to token shards."""

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from nanochat.config import TrainMidConfig, TrainSFTConfig
from nanochat.workspace import Workspace


def builtin() -> None:
    """Write the built-in corpus to base_data: Python's own reference, docstrings and sources."""
    from nanochat.corpus.builtin import build_builtin_corpus

    _describe_corpus(build_builtin_corpus(Workspace.from_environment().base_data))


def local(
    folder: Positional[Path],
    /,
    *,
    text_column: str = "text",
    rows_per_shard: int = 65_536,
    validation_rows: int = 10_000,
    seed: int = 0,
) -> None:
    """Write base_data from a folder of .parquet, .jsonl, .jsonl.zst or .txt files.

    Args:
        folder: read with everything below it.
        text_column: the column or key that holds the text.
        rows_per_shard: documents per shard.
        validation_rows: documents set aside for validation, at most a tenth of all.
        seed: decides which documents those are.
    """
    from nanochat.corpus.local import build_local_corpus

    _describe_corpus(
        build_local_corpus(
            folder,
            Workspace.from_environment().base_data,
            text_column=text_column,
            rows_per_shard=rows_per_shard,
            validation_rows=validation_rows,
            seed=seed,
        )
    )


def adopt() -> None:
    """Take over shard_*.parquet files that are in base_data already: check them and write their manifest.

    For shards that another tool prepared or downloaded. They need a column `text`; the last becomes validation.
    """
    from nanochat.corpus.shards import adopt

    _describe_corpus(adopt(Workspace.from_environment().base_data).manifest)


def tokenize(*, workers: int | None = None) -> None:
    """Turn base_data into token shards, once, on CPU; carries on where it was stopped.

    Args:
        workers: processes; default: one per core.
    """
    from nanochat.pipeline import tokenize_stage

    workspace = Workspace.from_environment()
    outputs = tokenize_stage(workspace, workers)
    print(f"{workspace.tokens}: fingerprint {outputs['fingerprint']}")


def conversations(
    stage: Positional[Literal["mid", "sft"]],
    /,
    *,
    tasks: tuple[str, ...] = (),
    sequence_len: int = 2048,
) -> None:
    """Turn conversations into token shards for midtraining or finetuning, once, on CPU.

    Args:
        stage: the stage that will train on them.
        tasks: NAME, NAME:xN for N times all of them, NAME:N for N of them, or jsonl=FILE; default: the stage's own.
        sequence_len: the model's context, in tokens; longer conversations are cut.
    """
    from nanochat.pipeline import conversations_stage
    from nanochat.tracking.console import Console

    workspace = Workspace.from_environment()
    defaults = TrainMidConfig().tasks if stage == "mid" else TrainSFTConfig().tasks
    made = conversations_stage(stage, tasks or defaults, sequence_len, workspace, Console())
    print(f"{workspace.conversation_tokens(stage)}: fingerprint {made}")


def stage(
    tasks: Annotated[Positional[tuple[str, ...]], arg(metavar="[TASKS ...]")] = (), /, *, revision: str = "main"
) -> None:
    """Download the data sets behind tasks to task_data, on a machine with network; what is there is kept.

    Args:
        tasks: names of tasks; default: all that read files.
        revision: branch, tag or commit of the data sets' repositories.
    """
    from nanochat.tasks.staging import stage as stage_tasks

    for name, folder, is_new in stage_tasks(tasks, Workspace.from_environment().task_data, revision):
        print(f"{name}: {folder} ({'downloaded' if is_new else 'was there'})", flush=True)


def _describe_corpus(manifest: dict[str, Any]) -> None:
    """Say what a corpus holds."""
    from nanochat.tracking.console import format_bytes, format_count

    for split, totals in manifest["totals"].items():
        print(f"{split}: {format_count(totals['rows'])} documents, {format_bytes(totals['text_bytes'])}")
    print(f"{Workspace.from_environment().base_data}: fingerprint {manifest['fingerprint']}")
