"""Examinations."""

from typing import Annotated, Literal

from tyro.conf import arg

from nanochat.workspace import Workspace


def eval_base(
    *,
    model_tag: str | None = None,
    max_per_task: int | None = None,
    batch_size: int = 16,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Measure a base model: bits per byte of the validation text, and CORE where eval_bundle is there.

    Args:
        model_tag: which model; default: the only one there is.
        max_per_task: of each CORE task at most this many problems; default: all.
        batch_size: texts per forward pass on one device. Lower it when memory runs out.
        device: where to compute. auto: the GPU if there is one.
        dtype: type of activations and matmuls. auto: bfloat16 where it is fast.
    """
    from nanochat.checkpoint.trained_model import load_trained_model
    from nanochat.evaluation.base_eval import evaluate_base
    from nanochat.runtime import start_runtime
    from nanochat.tracking.console import Console

    workspace = Workspace.from_environment()
    with start_runtime(device, dtype, cache=workspace.cache) as runtime:
        console = Console(enabled=runtime.is_main)
        trained = load_trained_model(workspace, "base", model_tag, runtime, console)
        evaluate_base(trained, workspace, runtime, batch_size=batch_size, max_per_task=max_per_task, console=console)


def eval_chat(
    *,
    stage: Annotated[Literal["base", "mid", "sft"], arg(aliases=["-i"])] = "sft",
    model_tag: str | None = None,
    tasks: tuple[str, ...] = (),
    max_problems: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Examine a model with multiple choice and with problems answered in free text.

    Args:
        stage: which stage's model.
        model_tag: which model; default: the only one there is.
        tasks: names of tasks; default: those it was trained on, or small ones that need no data.
        max_problems: of each task at most this many, always the same sample; default: all.
        max_new_tokens: longest answer in free text.
        batch_size: problems per forward pass on one device. Lower it when memory runs out.
        device: where to compute. auto: the GPU if there is one.
        dtype: type of activations and matmuls. auto: bfloat16 where it is fast.
    """
    from nanochat.checkpoint.trained_model import load_trained_model
    from nanochat.evaluation.chat_eval import evaluate_chat, tasks_to_examine
    from nanochat.runtime import start_runtime
    from nanochat.tasks.registry import open_task
    from nanochat.tracking.console import Console

    workspace = Workspace.from_environment()
    with start_runtime(device, dtype, cache=workspace.cache) as runtime:
        console = Console(enabled=runtime.is_main)
        trained = load_trained_model(workspace, stage, model_tag, runtime, console)
        named = [open_task(name, workspace.task_data) for name in dict.fromkeys(tasks)]
        evaluate_chat(
            trained,
            named or tasks_to_examine(trained, workspace.task_data),
            workspace,
            runtime,
            batch_size=batch_size,
            max_problems=max_problems,
            max_new_tokens=max_new_tokens,
            console=console,
        )
