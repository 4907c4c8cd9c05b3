"""Whole runs: the demo, and the pipeline at full size."""

import shlex
from typing import Annotated

from tyro.conf import arg

from nanochat.commands.options import SpeedrunSettings, run_name
from nanochat.config import (
    DEMO_BASE,
    DEMO_EVAL,
    DEMO_MID,
    DEMO_QUESTION,
    DEMO_SFT,
    DEMO_TOKENIZER,
    RunConfig,
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


def speedrun(settings: Annotated[SpeedrunSettings, arg(name="")]) -> None:
    """Run the whole pipeline, or some of its stages, skipping what is done.

    Args:
        settings: the run.
    """
    from nanochat.pipeline import run_pipeline
    from nanochat.runtime import start_runtime

    config, chosen = settings.config(run_name(settings.run)), stage_names(settings.stages)
    workspace = Workspace.from_environment()
    with start_runtime(config.base.device, config.base.dtype, cache=workspace.cache) as runtime:
        run_pipeline(config, workspace, runtime, chosen)
