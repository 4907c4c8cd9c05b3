"""What each command does, in its signature: tyro turns parameters into flags and docstrings into help.

Imports are inside the functions, so that help never waits for torch.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from nanochat.config import ALL_STAGES, DEMO_BASE, DEMO_TOKENIZER, StageName, TokenizerConfig, TrainBaseConfig
from nanochat.workspace import Workspace, check_run_name

DEMO_RUN = "demo"


def default_run_name() -> str:
    """The run name that WANDB_RUN gives, as Slurm users are used to set it; empty if it is not set."""
    return os.environ.get("WANDB_RUN", "")


def demo() -> None:
    """Train a small model on built-in text, on any machine, in minutes.

    Tokenizer, tokens, base model and report, in a folder of its own below NANOCHAT_BASE_DIR. Run it again and it
    carries on, or says that it is done.
    """
    from nanochat.pipeline import RunConfig, run_pipeline
    from nanochat.runtime import start_runtime

    workspace = Workspace(Workspace.from_environment().root / "demo")
    config = RunConfig(run=DEMO_RUN, data="builtin", tokenizer=DEMO_TOKENIZER, base=DEMO_BASE)
    with start_runtime(config.base.device, config.base.dtype) as runtime:
        run_pipeline(config, workspace, runtime)


def speedrun(
    *,
    base: OmitArgPrefixes[TrainBaseConfig],
    tokenizer: OmitArgPrefixes[TokenizerConfig],
    run: str = "",
    data: str = "existing",
    stages: tuple[StageName, ...] = (),
    workers: int | None = None,
) -> None:
    """Run the whole pipeline, or some of its stages, skipping what is done.

    Args:
        base: the base model.
        tokenizer: the tokenizer.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
        data: `existing` for the shards in base_data, `builtin` for the built-in text, or a folder of text.
        stages: which stages, of corpus tokenizer tokenize base report; default: all.
        workers: processes that tokenise; default: one per core.
    """
    from nanochat.pipeline import RunConfig, run_pipeline
    from nanochat.runtime import start_runtime

    name = check_run_name(run or default_run_name())
    config = RunConfig(run=name, data=data, tokenizer=tokenizer, base=base, workers=workers)
    with start_runtime(base.device, base.dtype) as runtime:
        run_pipeline(config, Workspace.from_environment(), runtime, stages or ALL_STAGES)


def data_builtin() -> None:
    """Write the built-in corpus to base_data: Python's own reference, docstrings and sources."""
    from nanochat.corpus.builtin import build_builtin_corpus

    _describe_corpus(build_builtin_corpus(Workspace.from_environment().base_data))


def data_local(
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


def data_adopt() -> None:
    """Take over shard_*.parquet files that are in base_data already: check them and write their manifest.

    For shards that another tool prepared or downloaded. They need a column `text`; the last becomes validation.
    """
    from nanochat.corpus.shards import adopt

    _describe_corpus(adopt(Workspace.from_environment().base_data).manifest)


def data_tokenize(*, workers: int | None = None) -> None:
    """Turn base_data into token shards, once, on CPU; carries on where it was stopped.

    Args:
        workers: processes; default: one per core.
    """
    from nanochat.pipeline import tokenize_stage

    workspace = Workspace.from_environment()
    outputs = tokenize_stage(workspace, workers)
    print(f"{workspace.tokens}: fingerprint {outputs['fingerprint']}")


def tokenizer_train(config: OmitArgPrefixes[TokenizerConfig]) -> None:
    """Train a tokenizer on base_data.

    Args:
        config: its settings.
    """
    from nanochat.pipeline import tokenizer_stage

    workspace = Workspace.from_environment()
    tokenizer_stage(config, workspace)
    tokenizer_eval()


def tokenizer_eval() -> None:
    """Measure the tokenizer: bytes per token by kind of text, next to GPT-2's and GPT-4's where those are on disk."""
    from nanochat.pipeline import corpus_samples
    from nanochat.tokenizer.evaluate import SAMPLES, evaluate_tokenizer, render
    from nanochat.tokenizer.tokenizer import Tokenizer

    workspace = Workspace.from_environment()
    tokenizer = Tokenizer.load(workspace.tokenizer)
    print(render(evaluate_tokenizer(tokenizer, {**SAMPLES, **corpus_samples(workspace)})))


def train_base(config: OmitArgPrefixes[TrainBaseConfig], *, run: str = "") -> None:
    """Pretrain a base model on the token shards; carries on from its newest checkpoint.

    Args:
        config: the model and its training.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    from nanochat.runtime import start_runtime
    from nanochat.training.base import train_base as train

    name = check_run_name(run or default_run_name())
    with start_runtime(config.device, config.dtype) as runtime:
        train(config, name, Workspace.from_environment(), runtime)


def report(*, run: str = "") -> None:
    """Render report/report.md from what the stages stored.

    Args:
        run: name of the run; default: the environment's WANDB_RUN.
    """
    from nanochat.errors import UsageError
    from nanochat.tracking.report import render_report

    workspace, name = Workspace.from_environment(), check_run_name(run or default_run_name())
    if not workspace.run(name).is_dir():
        raise UsageError(f"there is no run {name!r} in {workspace.root}", f"see: ls {workspace.root / 'runs'}")
    print(render_report(workspace.report, name))


def _describe_corpus(manifest: dict[str, Any]) -> None:
    """Say what a corpus holds."""
    from nanochat.tracking.console import format_bytes, format_count

    for split, totals in manifest["totals"].items():
        print(f"{split}: {format_count(totals['rows'])} documents, {format_bytes(totals['text_bytes'])}")
    print(f"{Workspace.from_environment().base_data}: fingerprint {manifest['fingerprint']}")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "speedrun": speedrun,
    "data builtin": data_builtin,
    "data local": data_local,
    "data adopt": data_adopt,
    "data tokenize": data_tokenize,
    "tokenizer train": tokenizer_train,
    "tokenizer eval": tokenizer_eval,
    "train base": train_base,
    "report": report,
}
