"""What a trained model is for."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanochat.workspace import Workspace


def chat(
    *,
    stage: Annotated[Literal["base", "mid", "sft"], arg(aliases=["-i"])] = "sft",
    prompt: Annotated[str, arg(aliases=["-p"])] = "",
    model_tag: str | None = None,
    temperature: float = 0.6,
    top_k: int | None = 50,
    max_new_tokens: int = 256,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Talk to a model in the terminal.

    A base model knows no conversations: it continues each line as a text of its own.

    Args:
        stage: which stage's model. `-i` for short.
        prompt: answer this, then end; default: one line after the other. `-p` for short.
        model_tag: which model; default: the only one there is.
        temperature: 0 takes the likeliest token every time, 1 draws as the model was trained.
        top_k: draw only from this many likeliest tokens. None draws from all.
        max_new_tokens: longest answer, in tokens.
        seed: decides what is drawn. The same lines with the same seed get the same answers.
        device: where to compute. auto: the GPU if there is one.
        dtype: type of activations and matmuls. auto: bfloat16 where it is fast.
    """
    from nanochat.chat.engine import Sampling
    from nanochat.chat.terminal import answer, chat_in_terminal, write_out
    from nanochat.checkpoint.trained_model import load_trained_model
    from nanochat.runtime import start_runtime
    from nanochat.tracking.console import Console

    sampling = Sampling(max_new_tokens, temperature, top_k, seed)
    workspace = Workspace.from_environment()
    with start_runtime(device, dtype, cache=workspace.cache) as runtime:
        console = Console()
        trained = load_trained_model(workspace, stage, model_tag, runtime, console)
        if prompt:
            answer(trained, prompt, sampling, write_out)
            write_out("\n")
        else:
            chat_in_terminal(trained, sampling, console)


def export_hf(
    folder: Positional[Path],
    /,
    *,
    stage: Literal["base", "mid", "sft"] = "sft",
    model_tag: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a classic model as a folder that Hugging Face transformers loads.

    The newest checkpoint, with tokenizer, chat template and model card. An earlier export in the folder is replaced.

    Args:
        folder: the folder to write.
        stage: which stage's model.
        model_tag: which model; default: the only one there is.
        dtype: type of the stored weights. bfloat16 takes half the room.
    """
    from nanochat.export.huggingface import export_huggingface
    from nanochat.tracking.console import Console

    trained = export_huggingface(Workspace.from_environment(), stage, model_tag, folder, dtype, Console())
    print(f"{folder}: {trained.tag} after {trained.step} steps of {stage}, for transformers 5 and newer")
