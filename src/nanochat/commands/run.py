"""Whole runs: the demo, and the pipeline at full size."""

import shlex
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from nanochat.commands.options import run_name
from nanochat.config import (
    DEMO_BASE,
    DEMO_EVAL,
    DEMO_MID,
    DEMO_QUESTION,
    DEMO_SFT,
    DEMO_TOKENIZER,
    EvalConfig,
    RunConfig,
    TokenizerConfig,
    TrainBaseConfig,
    TrainMidConfig,
    TrainSFTConfig,
    stage_names,
)
from nanochat.workspace import Workspace

DEMO_RUN = "demo"


def demo() -> None:
    """Train a small chat model on built-in text, on any machine, in minutes.

    Tokenizer, tokens, base model, midtraining, finetuning, evaluation and report, in a folder of its own below
    NANOCHAT_BASE_DIR; then the model answers a question. Run it again and it carries on, or says that it is done.
    """
    from nanochat.chat.engine import Sampling
    from nanochat.chat.terminal import answer
    from nanochat.checkpoint.trained_model import load_trained_model
    from nanochat.pipeline import run_pipeline
    from nanochat.runtime import start_runtime
    from nanochat.tracking.console import Console

    workspace = Workspace(Workspace.from_environment().root / "demo")
    config = RunConfig(
        run=DEMO_RUN,
        data="builtin",
        tokenizer=DEMO_TOKENIZER,
        base=DEMO_BASE,
        mid=DEMO_MID,
        sft=DEMO_SFT,
        evaluation=DEMO_EVAL,
    )
    with start_runtime(config.base.device, config.base.dtype, cache=workspace.cache) as runtime:
        run_pipeline(config, workspace, runtime)
        trained = load_trained_model(workspace, "sft", config.base.tag, runtime, Console(enabled=runtime.is_main))
        if runtime.is_main:
            print(f"\nyou: {DEMO_QUESTION}\nnanochat: ", end="", flush=True)
            answer(trained, DEMO_QUESTION, Sampling(max_new_tokens=64), lambda text: print(text, end="", flush=True))
            print(f"\n\nchat with it: NANOCHAT_BASE_DIR={shlex.quote(str(workspace.root))} nanochat chat")


def speedrun(
    *,
    base: OmitArgPrefixes[TrainBaseConfig],
    tokenizer: OmitArgPrefixes[TokenizerConfig],
    mid: TrainMidConfig,
    sft: TrainSFTConfig,
    evaluation: Annotated[EvalConfig, arg(name="eval")],
    run: str = "",
    data: str = "existing",
    stages: tuple[str, ...] = (),
    gpu_hour_price: float | None = None,
    workers: int | None = None,
) -> None:
    """Run the whole pipeline, or some of its stages, skipping what is done.

    Args:
        base: the base model, and how all stages use the machine.
        tokenizer: the tokenizer.
        mid: midtraining.
        sft: supervised finetuning.
        evaluation: what the models are examined with.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
        data: `existing` for the shards in base_data, `builtin` for the built-in text, or a folder of text.
        stages: which stages, of corpus,tokenizer,tokenize,base,mid,sft,eval,report; default: all.
        gpu_hour_price: what an hour of one GPU costs, for the report.
        workers: processes that tokenise; default: one per core.
    """
    from nanochat.pipeline import run_pipeline
    from nanochat.runtime import start_runtime

    name, chosen = run_name(run), stage_names(stages)
    config = RunConfig(
        run=name,
        data=data,
        tokenizer=tokenizer,
        base=base,
        mid=mid,
        sft=sft,
        evaluation=evaluation,
        gpu_hour_price=gpu_hour_price,
        workers=workers,
    )
    workspace = Workspace.from_environment()
    with start_runtime(base.device, base.dtype, cache=workspace.cache) as runtime:
        run_pipeline(config, workspace, runtime, chosen)
