"""The stages of a run: what is done, what is stale, what to run next.

Each stage leaves a record under `runs/<run>/stages/`: a fingerprint of what it read and how it was configured, and
what it made. A stage is done when its record matches what would go in today and what it made is still there; then it
is skipped. Otherwise it runs, and as every stage carries on from its own partial work, the same command is right
after a crash, a time limit or a preemption.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folders import KIND as CHECKPOINT_KIND
from nanochat.checkpoint.folders import checkpoint_folder, list_steps, tensors_fingerprint
from nanochat.checkpoint.trained_model import load_trained_model
from nanochat.cluster.preflight import Request, require
from nanochat.config import (
    ALL_STAGES,
    RunConfig,
    StageName,
    TrainChatConfig,
)
from nanochat.corpus.local import find_text_files
from nanochat.corpus.shards import FIX_CORPUS
from nanochat.data_stages import conversations_stage, corpus_stage, report_section, tokenize_stage, tokenizer_stage
from nanochat.errors import DataError, StoppedForRequeueError, StopSignal, UsageError
from nanochat.evaluation.chat_eval import DEFAULT_TASKS, evaluate_chat
from nanochat.evaluation.results import results_path
from nanochat.files import (
    MANIFEST_NAME,
    fingerprint,
    read_json,
    read_manifest,
    verify_files,
    write_json,
)
from nanochat.loader.token_shards import MANIFEST_KIND as TOKENS_KIND
from nanochat.runtime import Runtime, barrier, from_main, run_on_main
from nanochat.tasks.mixture import examined_tasks, mixture_fingerprint
from nanochat.tasks.registry import open_task
from nanochat.tracking import keys
from nanochat.tracking.console import Console, format_seconds
from nanochat.tracking.environment import describe_environment
from nanochat.tracking.metrics import MetricsLog, Value
from nanochat.tracking.report import Sample, Section, render_report
from nanochat.tracking.runs import METRICS_NAME, begin_record, track_run
from nanochat.tracking.wandb_run import name_run, run_id_for
from nanochat.training.base import train_base
from nanochat.training.chat import SAMPLE_QUESTIONS, draw_answers, train_chat
from nanochat.training.continuing import identity_fields
from nanochat.training.heartbeat import Heartbeat, beating
from nanochat.training.recipe import base_shape, check_ranks, make_recipe
from nanochat.training.stopping import lost_stop
from nanochat.training.watchdog import watched
from nanochat.workspace import CHECKPOINT_FOLDERS, ChatStage, Stage, Workspace, check_run_name


@dataclass(frozen=True)
class PipelineStage:
    """One stage.

    Attributes:
        name: its name on the command line and in records.
        inputs: what decides its result, JSON-able: configuration and fingerprints.
        run: do it, and return its outputs, JSON-able.
        intact: whether outputs as recorded are still there.
        on_all_ranks: whether every rank takes part.
        always: run it every time, as it is cheap and must not be older than what it reads.
    """

    name: StageName
    inputs: Callable[[], dict[str, Any]]
    run: Callable[[], dict[str, Any]]
    intact: Callable[[dict[str, Any]], bool]
    on_all_ranks: bool = False
    always: bool = False


def record_path(workspace: Workspace, run: str, stage: str) -> Path:
    """Where a stage's record is."""
    return workspace.run(run) / "stages" / f"{stage}.json"


def run_pipeline(
    config: RunConfig, workspace: Workspace, runtime: Runtime, stages: tuple[StageName, ...] = ALL_STAGES
) -> None:
    """Run the chosen stages in order, skipping those that are done.

    Raises:
        NanochatError: a stage failed; those before it keep their results.
    """
    check_run_name(config.run)
    console = Console(enabled=runtime.is_main)
    chosen = build_stages(config, workspace, runtime, stages)
    if not chosen:
        raise UsageError("no stage was chosen", f"choose from {', '.join(ALL_STAGES)}")
    # Found now, not when the hours of training before it are over.
    run_on_main(lambda: require(Request(config, stages, workspace, gpus_per_node=runtime.world_size)))
    with beating(workspace.run(config.run) if runtime.is_main else None, chosen[0].name) as heartbeat:
        for index, stage in enumerate(chosen, start=1):
            heartbeat.enter(stage.name)
            with console.stage(index, len(chosen), stage.name), stopped_in(stage.name):
                _run_stage(stage, record_path(workspace, config.run, stage.name), runtime, console, heartbeat)


@contextmanager
def stopped_in(stage: StageName) -> Iterator[None]:
    """Say in which stage a signal ended the command; the loop says it itself."""
    try:
        yield
    except (StopSignal, Exception) as error:
        stop = error if isinstance(error, StopSignal) else lost_stop(error)
        if stop is None:
            raise
        message = f"stopped by {stop.signal_name} in stage {stage}"
        raise StoppedForRequeueError(message, "the same command carries on") from error


def _run_stage(
    stage: PipelineStage, record_file: Path, runtime: Runtime, console: Console, heartbeat: Heartbeat
) -> None:
    """Run one stage unless it is done, and record it."""
    # Looked up on rank 0 alone: if that fails there, run_on_main ends the others too.
    inputs = run_on_main(lambda: fingerprint(stage.inputs()))
    reason: str | None = from_main(run_on_main(lambda: _why_to_run(stage, record_file, inputs)))
    if reason is None:
        console.info("already done")
        return
    if reason:
        console.info(reason)
    started = time.time()
    heartbeat.beat("running")
    outputs = stage.run() if stage.on_all_ranks else run_on_main(stage.run)
    if runtime.is_main:
        write_json(
            record_file,
            {
                "stage": stage.name,
                "inputs": inputs,
                "outputs": outputs,
                "started": started,
                "seconds": time.time() - started,
            },
        )
    barrier()


def _why_to_run(stage: PipelineStage, record_file: Path, inputs: str | None) -> str | None:
    """None if the stage is done; otherwise why it runs, empty if it simply never has."""
    if stage.always or not record_file.exists():
        return ""
    try:
        record = read_json(record_file)
        if record["inputs"] != inputs:
            return "its inputs or settings changed since it last ran"
        if not stage.intact(record["outputs"]):
            return "what it made has gone or was replaced"
    except (DataError, KeyError, TypeError, OSError):
        return "the record of its last run, or what it made, is damaged"
    return None


def manifest_fingerprint(folder: Path, kind: str, fix: str) -> str:
    """What a folder holds, in one word; an error names the command that makes it."""
    value: str = read_manifest(folder, kind, fix)["fingerprint"]
    return value


def is_intact(folder: Path, kind: str, expected: str) -> bool:
    """Whether a folder is still the one that was made, with every file there at its full size."""
    if not (folder / MANIFEST_NAME).exists():
        return False
    manifest = read_manifest(folder, kind, "")
    verify_files(folder, manifest["files"], "", checksums=False)
    return bool(manifest["fingerprint"] == expected)


def build_stages(
    config: RunConfig, workspace: Workspace, runtime: Runtime, stages: Collection[StageName]
) -> list[PipelineStage]:
    """The chosen stages of a run, first to last."""

    def made(folder: Path, kind: str) -> Callable[[dict[str, Any]], bool]:
        return lambda outputs: is_intact(folder, kind, outputs["fingerprint"])

    def corpus() -> str:
        return manifest_fingerprint(workspace.base_data, "corpus", FIX_CORPUS)

    def tokenizer() -> str:
        return manifest_fingerprint(workspace.tokenizer, "tokenizer", "nanochat tokenizer train")

    def tokens() -> str:
        return manifest_fingerprint(workspace.tokens, "tokens", "nanochat data tokenize")

    def trained(outputs: dict[str, Any]) -> bool:
        folder = checkpoint_folder(workspace.root / outputs["checkpoints"], outputs["steps"])
        return is_intact(folder, CHECKPOINT_KIND, outputs["fingerprint"])

    def conversations_at_hand() -> dict[ChatStage, str]:
        """The conversations that can become tokens along with the text, so that no node with GPUs does that.

        Those of the stages to come whose data are here; of all of them where a run only prepares.
        """
        found: dict[ChatStage, str] = {}
        chats: dict[ChatStage, TrainChatConfig] = {"mid": config.mid, "sft": config.sft}
        for name, chat in chats.items():
            if name in stages or "base" not in stages:
                with suppress(DataError):
                    found[name] = mixture_fingerprint(chat.tasks, workspace.task_data)
        return found

    def run_tokenize() -> dict[str, Any]:
        outputs = tokenize_stage(workspace, config.workers)
        for name in conversations_at_hand():
            tasks = (config.mid if name == "mid" else config.sft).tasks
            conversations_stage(name, tasks, config.base.sequence_len, workspace, Console())
        return outputs

    def run_base() -> dict[str, Any]:
        # Found now, not when the hours of training before it are over.
        run_on_main(lambda: check_world_size(config, stages, workspace, runtime.world_size))
        return train_base(config.base, config.run, workspace, runtime, config.also_validate)

    def chat_stage(name: ChatStage, chat: TrainChatConfig) -> PipelineStage:
        def run() -> dict[str, Any]:
            run_on_main(lambda: conversations_stage(name, chat.tasks, config.base.sequence_len, workspace, Console()))
            return train_chat(name, chat, config.base, config.run, config.base.tag, workspace, runtime)

        return PipelineStage(
            name,
            inputs=lambda: {
                "source_checkpoint": newest_fingerprints(workspace, config.base.tag).get(chat.source),
                "tokenizer": tokenizer(),
                "conversations": mixture_fingerprint(chat.tasks, workspace.task_data),
                **identity_fields(dataclasses.asdict(chat)),
            },
            run=run,
            intact=trained,
            on_all_ranks=True,
        )

    def run_eval() -> dict[str, Any]:
        with watched(workspace, config.run, "eval", runtime, config.base.stall_minutes) as heartbeat:
            heartbeat.beat("evaluating")
            return eval_stage(config, workspace, runtime)

    every_stage = [
        PipelineStage(
            "corpus",
            inputs=lambda: corpus_inputs(config.data),
            run=lambda: corpus_stage(config, workspace),
            intact=made(workspace.base_data, "corpus"),
        ),
        PipelineStage(
            "tokenizer",
            inputs=lambda: {
                "corpus": corpus(),
                **dataclasses.asdict(config.tokenizer),
            },
            run=lambda: tokenizer_stage(config.tokenizer, workspace),
            intact=made(workspace.tokenizer, "tokenizer"),
        ),
        PipelineStage(
            "tokenize",
            inputs=lambda: {
                "corpus": corpus(),
                "tokenizer": tokenizer(),
                "conversations": conversations_at_hand(),
                "sequence_len": config.base.sequence_len,
            },
            run=run_tokenize,
            intact=made(workspace.tokens, "tokens"),
        ),
        PipelineStage(
            "base",
            inputs=lambda: {
                "tokens": tokens(),
                **identity_fields(dataclasses.asdict(config.base)),
            },
            run=run_base,
            intact=trained,
            on_all_ranks=True,
        ),
        chat_stage("mid", config.mid),
        chat_stage("sft", config.sft),
        PipelineStage(
            "eval",
            inputs=lambda: {
                "checkpoints": newest_fingerprints(workspace, config.base.tag),
                **{
                    name: value for name, value in dataclasses.asdict(config.evaluation).items() if name != "batch_size"
                },
            },
            run=run_eval,
            intact=lambda outputs: all((workspace.root / name).is_file() for name in outputs["results"]),
            on_all_ranks=True,
        ),
        PipelineStage(
            "report",
            inputs=dict,
            run=lambda: report_stage(config, workspace),
            intact=lambda outputs: True,
            always=True,
        ),
    ]
    return [stage for stage in every_stage if stage.name in stages]


def check_world_size(config: RunConfig, stages: Collection[StageName], workspace: Workspace, world_size: int) -> None:
    """Check that the chosen stages can share their rows and lanes evenly.

    Raises:
        UsageError: one cannot.
    """
    manifest = read_manifest(workspace.tokens, TOKENS_KIND, "nanochat data tokenize")
    shape = base_shape(config.base, manifest["tokenizer"]["vocab_size"])
    recipe = make_recipe(config.base, shape, manifest["totals"]["train"]["tokens"])
    for error in check_ranks(config, stages, recipe, world_size):
        raise error


def corpus_inputs(data: str) -> dict[str, Any]:
    """What decides the corpus: its source and, of a folder, which files lie there, how large and how new."""
    if data in ("builtin", "existing"):
        return {"data": data}
    folder = Path(data).resolve()
    stats = [(path.relative_to(folder), path.stat()) for path in find_text_files(folder)[0]]
    return {"data": str(folder), "files": [[str(name), stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def newest_fingerprints(workspace: Workspace, model_tag: str) -> dict[Stage, str]:
    """What is in a model's newest checkpoints, by stage, of the stages that have one."""
    found: dict[Stage, str] = {}
    for stage in CHECKPOINT_FOLDERS:
        folder = workspace.checkpoints(stage, model_tag)
        if steps := list_steps(folder):
            newest = checkpoint_folder(folder, steps[-1])
            found[stage] = tensors_fingerprint(read_manifest(newest, CHECKPOINT_KIND, f"nanochat train {stage}"))
    return found


def eval_stage(config: RunConfig, workspace: Workspace, runtime: Runtime) -> dict[str, Any]:
    """Examine what every stage made with the same problems, and let it answer the same questions."""
    started = time.time()
    console = Console(enabled=runtime.is_main)
    opened = [open_task(name, workspace.task_data) for name in examined_tasks(config)]
    tasks = [task for task in opened if task.kind != "talk"]
    # Conversations of one's own have no right answers.
    tasks = tasks or [open_task(name, workspace.task_data) for name in DEFAULT_TASKS]
    contents: dict[str, dict[str, Any]] = {}
    samples: list[Sample] = []
    files = []
    stages: list[Stage] = ["base", "mid", "sft"]
    for stage in [stage for stage in stages if list_steps(workspace.checkpoints(stage, config.base.tag))]:
        console.info(f"{stage}:")
        trained = load_trained_model(workspace, stage, config.base.tag, runtime, console)
        content = evaluate_chat(
            trained,
            tasks,
            workspace,
            runtime,
            batch_size=config.evaluation.batch_size,
            max_problems=config.evaluation.max_problems,
            max_new_tokens=config.evaluation.max_new_tokens,
            console=console,
        )
        files.append(str(results_path(workspace, trained, "chat").relative_to(workspace.root)))
        contents[stage] = {"checkpoint": trained.fingerprint, **content}
        if runtime.is_main:
            answers = draw_answers(trained.model, trained.tokenizer)
            samples += [Sample(f"{stage.upper()}: {answer['prompt']}", answer["text"]) for answer in answers]
    if runtime.is_main:
        # All answers to a question side by side.
        num_questions = len(SAMPLE_QUESTIONS)
        samples = [sample for place in range(num_questions) for sample in samples[place::num_questions]]
        section = Section(
            title="Evaluation",
            figures={f"Chance, {task.name}": f"{task.chance:.1%}" for task in tasks},
            config=dataclasses.asdict(config.evaluation),
            notes=[
                "Accuracies on problems that no stage has trained on, with 95 % intervals (Wilson).",
                "Mean centred accuracy: over the tasks, guessing is 0 and knowing everything is 1.",
            ],
            samples=samples,
            compared={stage: summary_of(content) for stage, content in contents.items()},
            gpus=runtime.num_gpus,
            seconds=time.time() - started,
        )
        report_section(workspace, "eval", section)
        track_evaluation(config, workspace, contents, samples)
    return {"results": files}


def track_evaluation(
    config: RunConfig, workspace: Workspace, contents: Mapping[str, dict[str, Any]], samples: Sequence[Sample]
) -> None:
    """Show the results where the training is shown: a row for each stage examined, numbered in their order."""
    examined = {stage: content["checkpoint"] for stage, content in contents.items()}
    settings = {**dataclasses.asdict(config.evaluation), "examined": examined}
    names = name_run(
        config.run,
        "eval",
        project=config.base.wandb_project,
        group=config.base.wandb_group,
        tags=(config.base.tag, *config.base.wandb_tags),
    )
    # Another examination is another run: W&B does not replace rows.
    names = dataclasses.replace(names, id=run_id_for(config.run, f"eval-{fingerprint(settings)[:8]}"))
    folder = workspace.run(config.run) / "eval" / config.base.tag
    record = begin_record(
        folder,
        names,
        run=config.run,
        stage="eval",
        model_tag=config.base.tag,
        num_steps=0,
        config={**settings, "environment": describe_environment()},
    )
    kept = ("n", "accuracy", "low", "high", "chance", "centred")
    with (
        MetricsLog(folder / METRICS_NAME) as log,
        track_run(record, folder, workspace.wandb, config.base.wandb) as tracked,
    ):
        log.resume(-1)
        table = []
        for step, (stage, content) in enumerate(contents.items(), start=1):
            accuracies = {name: result["accuracy"] for name, result in content["results"].items()}
            values = {f"epoch/{name}": value for name, value in accuracies.items()}
            values["epoch/mean_centred"] = content["mean_centred"]
            log.log(step, values)
            tracked.wandb.log(values, step)
            tracked.final |= {f"final/{stage}/{key.removeprefix('epoch/')}": value for key, value in values.items()}
            table += [
                {"stage": stage, "task": name, **{key: result[key] for key in kept}}
                for name, result in content["results"].items()
            ]
        tracked.wandb.table("epoch/tasks", table, len(contents))
        tracked.wandb.table(keys.SAMPLES, [{"prompt": one.prompt, "text": one.text} for one in samples], len(contents))


def summary_of(content: dict[str, Any]) -> dict[str, Value]:
    """The results of one checkpoint as lines of the report's summary."""
    lines: dict[str, Value] = {
        f"{name} (n = {result['n']})": f"{result['accuracy']:.1%} ({result['low']:.1%} – {result['high']:.1%})"
        for name, result in content["results"].items()
    }
    mean, error = content["mean_centred"], content["mean_centred_error"]
    return {**lines, "Mean centred accuracy": f"{mean:.3f} ± {error:.3f}"}


def report_stage(config: RunConfig, workspace: Workspace) -> dict[str, Any]:
    """Render the report from what the stages stored."""
    path = render_report(workspace.report, config.run, config.gpu_hour_price)
    seconds = sum(
        read_json(record_path(workspace, config.run, stage))["seconds"]
        for stage in ALL_STAGES
        if record_path(workspace, config.run, stage).exists()
    )
    Console().info(f"{path}  (all stages: {format_seconds(seconds)})")
    return {"report": str(path.relative_to(workspace.root))}
