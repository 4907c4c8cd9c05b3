"""What each command does, in its signature: tyro turns parameters into flags and docstrings into help.

Imports are inside the functions, so that help never waits for torch.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from nanochat.config import (
    DEMO_BASE,
    DEMO_EVAL,
    DEMO_MID,
    DEMO_QUESTION,
    DEMO_SFT,
    DEMO_TOKENIZER,
    EvalConfig,
    MachineConfig,
    TokenizerConfig,
    TrainBaseConfig,
    TrainChatConfig,
    TrainMidConfig,
    TrainSFTConfig,
    stage_names,
)
from nanochat.workspace import Workspace, check_run_name

DEMO_RUN = "demo"


def default_run_name() -> str:
    """The run name that WANDB_RUN gives, as Slurm users are used to set it; empty if it is not set."""
    return os.environ.get("WANDB_RUN", "")


def demo() -> None:
    """Train a small chat model on built-in text, on any machine, in minutes.

    Tokenizer, tokens, base model, midtraining, finetuning, evaluation and report, in a folder of its own below
    NANOCHAT_BASE_DIR; then the model answers a question. Run it again and it carries on, or says that it is done.
    """
    from nanochat.chat.engine import Sampling
    from nanochat.chat.terminal import answer
    from nanochat.checkpoint.trained_model import load_trained_model
    from nanochat.pipeline import RunConfig, run_pipeline
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
    from nanochat.pipeline import RunConfig, run_pipeline
    from nanochat.runtime import start_runtime

    name, chosen = check_run_name(run or default_run_name()), stage_names(stages)
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


def data_conversations(
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
    workspace = Workspace.from_environment()
    with start_runtime(config.device, config.dtype, cache=workspace.cache) as runtime:
        train(config, name, workspace, runtime)


def train_mid(
    config: OmitArgPrefixes[TrainMidConfig],
    machine: OmitArgPrefixes[MachineConfig],
    *,
    model_tag: str | None = None,
    run: str = "",
) -> None:
    """Midtrain a base model on conversations; carries on from its newest checkpoint.

    Args:
        config: the training.
        machine: how the machine is used.
        model_tag: which model; default: the only one there is.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    _train_chat("mid", config, machine, model_tag, run)


def train_sft(
    config: OmitArgPrefixes[TrainSFTConfig],
    machine: OmitArgPrefixes[MachineConfig],
    *,
    model_tag: str | None = None,
    run: str = "",
) -> None:
    """Finetune a midtrained model on conversations; carries on from its newest checkpoint.

    Args:
        config: the training.
        machine: how the machine is used.
        model_tag: which model; default: the only one there is.
        run: name of the run; default: the environment's WANDB_RUN. It never changes what is trained.
    """
    _train_chat("sft", config, machine, model_tag, run)


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


def doctor() -> None:
    """Say what this machine, or the image on it, offers for training, and for each problem what mends it.

    Nothing is written. It ends with exit code 3 if there is a problem.
    """
    from nanochat.cluster.doctor import examine, table
    from nanochat.errors import PreflightError
    from nanochat.identity import version_line

    print(version_line(), flush=True)
    findings = examine()
    print(table(findings))
    problems = sum(finding.state == "PROBLEM" for finding in findings)
    if problems:
        raise PreflightError(f"{problems} of {len(findings)} findings are problems", "the line of each says the fix")


def report(*, run: str = "", gpu_hour_price: float | None = None) -> None:
    """Render report/report.md from what the stages stored.

    Args:
        run: name of the run; default: the environment's WANDB_RUN.
        gpu_hour_price: what an hour of one GPU costs, to tell what the stages cost.
    """
    from nanochat.errors import UsageError
    from nanochat.tracking.report import render_report

    workspace, name = Workspace.from_environment(), check_run_name(run or default_run_name())
    if not workspace.run(name).is_dir():
        raise UsageError(f"there is no run {name!r} in {workspace.root}", f"see: ls {workspace.root / 'runs'}")
    print(render_report(workspace.report, name, gpu_hour_price))


def _train_chat(
    stage: Literal["mid", "sft"], config: TrainChatConfig, machine: MachineConfig, model_tag: str | None, run: str
) -> None:
    from nanochat.runtime import start_runtime
    from nanochat.training.chat import train_chat

    name = check_run_name(run or default_run_name())
    workspace = Workspace.from_environment()
    with start_runtime(machine.device, machine.dtype, cache=workspace.cache) as runtime:
        train_chat(stage, config, machine, name, model_tag, workspace, runtime)


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
    "data conversations": data_conversations,
    "stage": stage,
    "tokenizer train": tokenizer_train,
    "tokenizer eval": tokenizer_eval,
    "train base": train_base,
    "train mid": train_mid,
    "train sft": train_sft,
    "eval base": eval_base,
    "eval chat": eval_chat,
    "chat": chat,
    "report": report,
    "doctor": doctor,
    "export hf": export_hf,
}
