"""What would stop a run, found in seconds on a machine without GPU, before hours of many are spent on it.

`examine` makes every check and lists all that is wrong at once. It reads names, sizes and manifests, imports no torch,
writes nothing, and shows no key. The checks that the pipeline makes as it starts are the same functions.

docs/reference/preflight.md is made from this file and the functions named in `CHECKS`: each `Finding` that they return
and each error that they raise is a row, with what its f-strings insert as `<name>`. So texts stand where they are used,
and what they insert has a name that a reader understands.
"""

import dataclasses
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folders import KIND as CHECKPOINT_KIND
from nanochat.checkpoint.folders import checkpoint_folder, list_steps, tensors_fingerprint
from nanochat.cluster.findings import Finding, check_caches, check_folder, check_wandb, looked_at
from nanochat.config import (
    ALL_STAGES,
    ModelConfig,
    RunConfig,
    StageName,
    TrainChatConfig,
    model_from_depth,
    stage_names,
)
from nanochat.corpus.local import find_text_files
from nanochat.corpus.shards import FIX_CORPUS, open_corpus
from nanochat.errors import NanochatError, UsageError
from nanochat.files import MANIFEST_NAME, read_json, read_manifest, verify_files
from nanochat.loader.token_shards import MANIFEST_KIND as TOKENS_KIND
from nanochat.loader.token_shards import TOKENIZE_COMMAND, split_fingerprint
from nanochat.model.size import check_fp8_sizes, flops_per_token, parameter_counts
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.inventory import check_inventory
from nanochat.tasks.mixture import check_mixtures, mixtures_of, parse_mixture
from nanochat.tasks.own_jsonl import PREFIX, read_conversations
from nanochat.tasks.registry import STAGED, check_task_name, describe_task
from nanochat.tokenizer.tokenizer import FIX as FIX_TOKENIZER
from nanochat.tokenizer.train import check_tokenizer_settings, split_pattern
from nanochat.tracking.console import format_bytes, format_count, format_seconds
from nanochat.tracking.wandb_key import check_key
from nanochat.training.continuing import base_identity, identity_fields, refuse_other_run
from nanochat.training.recipe import Recipe, base_shape, chat_batch_size, check_ranks, make_recipe
from nanochat.workspace import Stage, Workspace, check_name, check_run_name

# A third of what an A100 can do in bfloat16 (312 TFLOP/s, NVIDIA's data sheet).
ASSUMED_TFLOPS = 100.0
# Stages that compute with a model, on the GPUs.
MODEL_STAGES: tuple[Stage, ...] = ("base", "mid", "sft")
# Two bytes for each token, which has two bytes of text or more.
TOKEN_BYTES_PER_TEXT_BYTE = 1.0
# A run's records, metrics, plots and caches, beside its shards and checkpoints.
OTHER_BYTES = 2**30
OTHER_FILES = 1000
# Enough of a long file to notice that it is not what it should be, in an instant.
CONVERSATIONS_READ = 10_000
# A file server that does not answer must not hold up the rest.
QUOTA_SECONDS = 2
# Where a machine keeps what is its own.
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
IN_MEMORY = ("tmpfs", "ramfs")

# https://slurm.schedmd.com/sbatch.html, --time
SLURM_TIMES = (
    re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
FIX_BASE_DIR = "export NANOCHAT_BASE_DIR=<a folder on scratch>"
FIX_CHECKPOINT = "choose another --model-tag"
FIX_WANDB_DIR = "export WANDB_DIR=<a folder on scratch>, or unset it"


@dataclass(frozen=True)
class Request:
    """A run as it is to be started.

    Attributes:
        config: its settings.
        stages: those asked for, as given; none for all.
        workspace: where it reads and writes.
        environment: the variables it will see.
        nodes: machines.
        gpus_per_node: GPUs of each; 0 trains on CPUs, with one process per machine.
        time_limit: of the job, in one of Slurm's forms; none asks nothing of time.
        gpu_tflops: what a GPU is assumed to do in a second, in 10¹² FLOPs.
        checksums: also read every byte of corpus and token shards.
    """

    config: RunConfig
    stages: tuple[str, ...]
    workspace: Workspace
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: os.environ)
    nodes: int = 1
    gpus_per_node: int = 1
    time_limit: str | None = None
    gpu_tflops: float = ASSUMED_TFLOPS
    checksums: bool = False

    def __post_init__(self) -> None:
        """Refuse a machine that cannot be."""
        for flag, number, least in (("--nodes", self.nodes, 1), ("--gpus-per-node", self.gpus_per_node, 0)):
            if number < least:
                raise UsageError(f"{flag} is {number}", f"give {flag} {least} or more")
        if self.gpu_tflops <= 0:
            raise UsageError(f"--gpu-tflops is {self.gpu_tflops}", "give a positive --gpu-tflops")

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.nodes * max(1, self.gpus_per_node)

    @cached_property
    def chosen(self) -> tuple[StageName, ...]:
        """The stages; all of them where what was asked for is wrong, which is a finding of its own."""
        try:
            return stage_names(self.stages)
        except UsageError:
            return ALL_STAGES

    @property
    def makes_corpus(self) -> bool:
        """Whether the run is to make a corpus, rather than to find one."""
        return "corpus" in self.chosen and self.config.data != "existing"

    def manifest(self, folder: Path) -> dict[str, Any] | None:
        """A folder's manifest if it can be read; that it cannot is the affair of the folder's own check."""
        try:
            manifest = read_json(folder / MANIFEST_NAME)
        except (NanochatError, OSError):
            return None
        return manifest if isinstance(manifest, dict) else None

    @cached_property
    def shape(self) -> ModelConfig:
        """The model. Raises UsageError if the sizes make none."""
        found = None if "tokenizer" in self.chosen else self.manifest(self.workspace.tokenizer)
        return base_shape(self.config.base, (found or {}).get("vocab_size", self.config.tokenizer.vocab_size))

    @cached_property
    def recipe(self) -> Recipe | None:
        """The numbers of pretraining; None while they depend on tokens that are not there. Raises UsageError."""
        found = self.manifest(self.workspace.tokens)
        if found and "tokenize" in self.chosen:
            corpus = None if self.makes_corpus else self.manifest(self.workspace.base_data)
            current = (corpus or {}).get("fingerprint"), self.shape.vocab_size
            found = found if (found["corpus"], found["tokenizer"]["vocab_size"]) == current else None
        if found is None and self.config.base.target_epochs is not None:
            return None
        return make_recipe(self.config.base, self.shape, found["totals"]["train"]["tokens"] if found else 0)

    def chat(self, stage: Stage) -> TrainChatConfig:
        """The settings of a stage that trains on conversations."""
        return self.config.mid if stage == "mid" else self.config.sft


def examine(asked: Request) -> list[Finding]:
    """Make every check."""
    return [finding for check in CHECKS for finding in looked_at(check.subject, partial(check.run, asked))]


def require(asked: Request) -> None:
    """Check what can be known before a run does anything, however it was started and wherever its data will come from.

    Raises:
        NanochatError: the first thing that is wrong.
    """
    for check in (check_run, check_model, check_task_data):
        for _ in check(asked):
            pass
    if "tokenizer" in asked.chosen:
        check_tokenizer_settings(**dataclasses.asdict(asked.config.tokenizer))
    if asked.recipe:
        for error in check_ranks(asked.config, asked.chosen, asked.recipe, asked.world_size):
            raise error


def check_run(asked: Request) -> Iterator[Finding]:
    """Whether the run has a name under which its results are found again."""
    yield Finding("run name", check_run_name(asked.config.run))


def check_stages(asked: Request) -> Iterator[Finding]:
    """Whether there are such stages."""
    yield Finding("stages", ", ".join(stage_names(asked.stages)))


def check_model(asked: Request) -> Iterator[Finding]:
    """Whether the sizes make a model, and what is trained for how long."""
    check_name(asked.config.base.tag, "model tag")
    parameters = format_count(parameter_counts(asked.shape)["total"])
    horizon = "as many steps as the tokens give"
    if recipe := asked.recipe:
        horizon = f"{recipe.num_steps} steps of {format_count(recipe.total_batch_size)} tokens"
    yield Finding("model", f"{asked.config.base.tag}: {parameters} parameters, {horizon}")


def check_processes(asked: Request) -> Iterator[Finding]:
    """Whether the processes share rows and lanes evenly in every stage."""
    if recipe := _recipe_if_sound(asked):
        errors = list(check_ranks(asked.config, asked.chosen, recipe, asked.world_size))
        for error in errors:
            yield Finding("processes", error.what, "PROBLEM", error.fix or "")
        if not errors:
            yield Finding("processes", f"{asked.world_size} share rows and lanes evenly")


def check_data(asked: Request) -> Iterator[Finding]:
    """Whether the text is there, whole, and the one that was asked for."""
    folder, data = asked.workspace.base_data, asked.config.data
    if not {"corpus", "tokenizer", "tokenize"} & set(asked.chosen):
        return
    if asked.makes_corpus:
        source: dict[str, Any] = {"name": "builtin"}
        if data != "builtin":
            files, _ = find_text_files(Path(data))
            total = format_bytes(sum(file.stat().st_size for file in files))
            yield Finding("data", f"{data}: {len(files)} files, {total}")
            source = {"name": "local", "files": len(files)}
        held = (asked.manifest(folder) or {}).get("source", source)
        if any(held.get(name) != value for name, value in source.items()):
            text, fix = f"{folder} holds another corpus than {data}", f"{FIX_BASE_DIR}, or: rm -r {folder}"
            yield Finding("data", text, "PROBLEM", fix)
        elif data == "builtin":
            yield Finding("data", "the built-in text")
        return
    shards = len(list(folder.glob("shard_*.parquet")))
    if shards and not (folder / MANIFEST_NAME).exists():
        yield Finding("data", f"{folder} holds {shards} shards without a manifest", "PROBLEM", "nanochat data adopt")
        return
    corpus = open_corpus(folder, FIX_CORPUS, asked.checksums)
    size = format_bytes(_text_bytes(corpus.manifest))
    yield Finding("data", f"{folder}: {shards} shards, {format_count(corpus.train_rows)} documents, {size} of text")


def check_tokenizer(asked: Request) -> Iterator[Finding]:
    """Whether there is a tokenizer, or one can be made."""
    settings = asked.config.tokenizer
    if "tokenizer" in asked.chosen:
        check_tokenizer_settings(**dataclasses.asdict(settings))
        yield Finding("tokenizer", f"a vocabulary of {settings.vocab_size}, trained by the run")
    elif asked.chosen != ("corpus",) and asked.chosen != ("report",):
        folder = asked.workspace.tokenizer
        manifest = read_manifest(folder, "tokenizer", FIX_TOKENIZER)
        verify_files(folder, manifest["files"], FIX_TOKENIZER)
        yield Finding("tokenizer", f"{folder}: a vocabulary of {manifest['vocab_size']}")


def check_tokens(asked: Request) -> Iterator[Finding]:
    """Whether there are token shards to pretrain on, made with the tokenizer that is there."""
    folder = asked.workspace.tokens
    if "tokenize" in asked.chosen:
        yield Finding("tokens", "made by the run; what is current is kept")
    elif "base" in asked.chosen:
        manifest = read_manifest(folder, TOKENS_KIND, TOKENIZE_COMMAND)
        verify_files(folder, manifest["files"], TOKENIZE_COMMAND, asked.checksums)
        tokenizer = (asked.manifest(asked.workspace.tokenizer) or {}).get("tokenizer_fingerprint")
        if tokenizer not in (None, manifest["tokenizer"]["fingerprint"]):
            text = f"{folder} was made with another tokenizer than {asked.workspace.tokenizer}"
            yield Finding("tokens", text, "PROBLEM", TOKENIZE_COMMAND)
        documents, lanes = manifest["totals"]["train"]["documents"], asked.config.base.lanes
        if documents < lanes:
            text, fix = f"{folder} holds {documents} documents for {lanes} lanes", f"more text, or --lanes {documents}"
            yield Finding("tokens", text, "PROBLEM", fix)
        yield Finding("tokens", f"{folder}: {format_count(manifest['totals']['train']['tokens'])} to train on")
    if "base" in asked.chosen:
        for other in asked.config.also_validate.values():
            verify_files(other, read_manifest(other, TOKENS_KIND, TOKENIZE_COMMAND)["files"], TOKENIZE_COMMAND)


def check_task_data(asked: Request) -> Iterator[Finding]:
    """Whether the conversations and problems of every later stage are there."""
    if mixtures := mixtures_of(asked.config, asked.chosen):
        check_mixtures(mixtures, asked.workspace.task_data)
        names = dict.fromkeys(entry.task for entries in mixtures for entry in parse_mixture(entries))
        for name in names:
            if name.startswith(PREFIX):
                yield _own_conversations(Path(name.removeprefix(PREFIX)).expanduser())
        yield Finding("task data", f"of {', '.join(names)}")


def check_staged(asked: Request) -> Iterator[Finding]:
    """Whether what was staged for machines without network is still there."""
    errors = check_inventory(asked.workspace.inventory, asked.checksums)
    read = [asked.workspace.base_data] if {"corpus", "tokenizer", "tokenize"} & set(asked.chosen) else []
    # A mixture that cannot be read is the affair of the check of task data.
    with suppress(UsageError):
        entries = chain.from_iterable(map(parse_mixture, mixtures_of(asked.config, asked.chosen)))
        read += [STAGED[entry.task][1].folder(asked.workspace.task_data) for entry in entries if entry.task in STAGED]
    for error in errors:
        # What this run does not read may have been deleted on purpose.
        is_read = asked.workspace.inventory.name in error.what or any(f"{folder}/" in error.what for folder in read)
        yield Finding("staged files", error.what, "PROBLEM" if is_read else "note", error.fix or "")
    if not errors and asked.workspace.inventory.exists():
        yield Finding("staged files", f"as {asked.workspace.inventory} lists them")


def _own_conversations(path: Path) -> Finding:
    """Read the start of a file of conversations; an error names the line."""
    count = sum(1 for _ in islice(read_conversations(path), CONVERSATIONS_READ))
    with path.open("rb") as stream:
        line = stream.readline()
    traits = {"a byte order mark": line.startswith(b"\xef\xbb\xbf"), "Windows line ends": line.endswith(b"\r\n")}
    harmless = " and ".join(trait for trait, is_there in traits.items() if is_there)
    read = f"{count} conversations{' at least' if count == CONVERSATIONS_READ else ''}"
    return Finding("task data", f"{path}: {read}{f'; {harmless} do no harm' if harmless else ''}")


def check_sources(asked: Request) -> Iterator[Finding]:
    """Whether the stage before is finished, where only later ones are chosen."""
    for stage in ("mid", "sft"):
        if stage in asked.chosen and asked.chat(stage).source not in asked.chosen:
            yield from looked_at("stage before", partial(_check_source, asked, stage))
    tag = asked.config.base.tag
    trained = [stage for stage in MODEL_STAGES if list_steps(asked.workspace.checkpoints(stage, tag))]
    if "eval" in asked.chosen and not trained and not set(MODEL_STAGES) & set(asked.chosen):
        fix = "add a stage that trains to --stages, or name another --model-tag"
        yield Finding("stage before", f"there is no checkpoint of {tag} to evaluate", "PROBLEM", fix)


def _check_source(asked: Request, stage: Stage) -> Finding:
    source = asked.chat(stage).source
    folder = asked.workspace.checkpoints(source, asked.config.base.tag)
    config, step = _newest(folder)
    if config is None:
        fix = f"add {source} to --stages, or name another --model-tag"
        return Finding("stage before", f"{folder} holds no checkpoint for {stage} to go on from", "PROBLEM", fix)
    horizon = config["recipe"]["num_steps"]
    if step < horizon:
        text, fix = f"{folder} is at step {step} of {horizon}", f"add {source} to --stages: it carries on"
        return Finding("stage before", text, "PROBLEM", fix)
    return Finding("stage before", f"{stage} goes on from {source}, step {step}")


def check_checkpoints(asked: Request) -> Iterator[Finding]:
    """Whether the model's folders are new, or hold what this very run left there."""
    for stage in MODEL_STAGES:
        if stage in asked.chosen:
            yield from looked_at("checkpoints", partial(_check_folder_of, asked, stage))


def _check_folder_of(asked: Request, stage: Stage) -> Finding:
    folder = asked.workspace.checkpoints(stage, asked.config.base.tag)
    config, step = _newest(folder)
    if config is None:
        return Finding("checkpoints", f"{folder}: none yet")
    # What is not known before it is made is taken to be as it was.
    identity = {**config["identity"], **_known_identity(asked, stage)}
    refuse_other_run(config, asked.config.run, identity, folder)
    horizon = config["recipe"]["num_steps"]
    state = f"carries on from step {step} of {horizon}" if step < horizon else f"finished, at step {step}"
    return Finding("checkpoints", f"{folder}: {state}")


def check_tracking(asked: Request) -> Iterator[Finding]:
    """How the run is recorded, and whether its records outlive the job."""
    mode = asked.config.base.wandb
    environment = {**asked.environment, **({} if mode == "auto" else {"WANDB_MODE": mode})}
    yield check_wandb(environment)
    if environment.get("WANDB_MODE") != "disabled":
        folder = Path(environment.get("WANDB_DIR") or asked.workspace.wandb).absolute()
        yield check_folder("WANDB_DIR", folder, FIX_WANDB_DIR)
        yield from check_shared(asked, "WANDB_DIR", folder, FIX_WANDB_DIR)


def check_workspace(asked: Request) -> Iterator[Finding]:
    """Whether the workspace can be written to and has room for what the run will make."""
    root, (needed, files) = asked.workspace.root, needed_room(asked)
    yield check_folder("NANOCHAT_BASE_DIR", root, FIX_BASE_DIR, enough=needed)
    yield Finding("room", f"about {format_bytes(needed)} in {format_count(files)} files will be written")
    there = next(folder for folder in (root, *root.parents) if os.access(folder, os.F_OK))
    status = os.statvfs(there)
    # Some file systems make inodes as they are needed, and count none.
    if status.f_files and status.f_favail < files:
        text = f"{there} has room for {status.f_favail} more files (inodes), {files} are needed"
        yield Finding("room", text, "PROBLEM", FIX_BASE_DIR)
    yield from check_quota(_quota_of(there), needed, files)
    yield from check_shared(asked, "NANOCHAT_BASE_DIR", root, FIX_BASE_DIR)


def check_quota(listing: str, needed: int, files: int) -> Iterator[Finding]:
    """Whether a quota leaves room.

    Args:
        listing: what `quota` or `lfs quota` prints: file system, KiB used, soft and hard limit, grace, and the same of
            files.
        needed: bytes.
        files: how many.
    """
    for used, soft, hard, files_used, files_soft, files_hard in _quota_rows(listing):
        limit, files_limit = hard or soft, files_hard or files_soft
        free, files_free = (limit - used) * 1024, files_limit - files_used
        if limit and free < needed:
            text = f"your quota leaves {format_bytes(max(0, free))}, about {format_bytes(needed)} are needed"
            yield Finding("quota", text, "PROBLEM", FIX_BASE_DIR)
        elif files_limit and files_free < files:
            text = f"your quota leaves {max(0, files_free)} files, about {files} are needed"
            yield Finding("quota", text, "PROBLEM", FIX_BASE_DIR)
        elif limit:
            yield Finding("quota", f"{format_bytes(free)} left")


def check_shared(asked: Request, subject: str, folder: Path, fix: str) -> Iterator[Finding]:
    """Whether other machines see a folder, as far as its name and file system tell."""
    mount, system = _mount_of(folder.absolute())
    if asked.nodes == 1 and asked.time_limit is None:
        return
    if system in IN_MEMORY:
        text = f"{folder} is in this machine's memory ({mount}): the job would not see it"
        yield Finding(subject, text, "PROBLEM", fix)
    elif any(folder.is_relative_to(local) for local in LOCAL_FOLDERS):
        yield Finding(subject, f"{folder} is probably on this machine alone: the job would not see it", "note", fix)


def check_cache_folders(asked: Request) -> list[Finding]:
    """Whether what torch.compile makes can be kept."""
    return [finding for finding in check_caches(asked.environment, asked.workspace) if finding.subject != "WANDB_DIR"]


def check_time(asked: Request) -> Iterator[Finding]:
    """Whether the job is long enough to get anywhere."""
    limit = parse_time_limit(asked.time_limit) if asked.time_limit else None
    recipe = _recipe_if_sound(asked)
    training = [stage for stage in MODEL_STAGES if stage in asked.chosen]
    if not asked.gpus_per_node or not training or recipe is None:
        return
    speed = asked.gpu_tflops * 1e12 * asked.world_size
    total, unknown = 0.0, []
    for stage in training:
        steps, batch = _steps_and_batch(asked, stage, recipe)
        seconds = flops_per_token(asked.shape) * batch / speed
        total += seconds * (steps or 0)
        if steps is None:
            unknown.append(stage)
        if limit is not None:
            yield from check_first_save(asked, stage, seconds, steps, limit)
    without = f", {' and '.join(unknown)} not counted" if unknown else ""
    time = f"{format_seconds(total)} at {asked.gpu_tflops:g} TFLOP/s per GPU{without}"
    if limit is not None and total > limit:
        text = f"training takes about {time}: more than the limit of {format_seconds(limit)}"
        yield Finding("time", text, "note", "it stops with a checkpoint, and the same command carries on")
    else:
        yield Finding("time", f"training takes about {time}")


def check_first_save(
    asked: Request, stage: Stage, step_seconds: float, steps: int | None, limit: float
) -> Iterator[Finding]:
    """Whether a stage writes a checkpoint within the time limit, without which no restart gets further."""
    settings = asked.config.base if stage == "base" else asked.chat(stage)
    until = min(filter(None, (settings.save_every, steps)), default=0) * step_seconds
    if until > limit:
        flag = "--save-every" if stage == "base" else f"--{stage}.save-every"
        text = f"{stage} would be cut off before its first checkpoint, which takes {format_seconds(until)}"
        if often := int(limit / 4 / step_seconds):
            yield Finding("time", text, "PROBLEM", f"{flag} {often}")
        else:
            yield Finding("time", text, "PROBLEM", "ask for more GPUs or a longer time limit")


def parse_time_limit(text: str) -> float | None:
    """Seconds of a time in one of Slurm's forms; None for no limit.

    Raises:
        UsageError: it is none.
    """
    if text.upper() in ("UNLIMITED", "INFINITE") or text == "0":
        return None
    for form in SLURM_TIMES:
        if match := form.fullmatch(text):
            parts = {name: int(digits) for name, digits in match.groupdict().items() if digits}
            return timedelta(**parts).total_seconds()
    raise UsageError(f"--time-limit {text!r} is not a time that Slurm reads", "give minutes, HH:MM:SS or D-HH:MM:SS")


def needed_room(asked: Request) -> tuple[int, int]:
    """Bytes and files that the run will add to the workspace, rather too many than too few."""
    needed, files = OTHER_BYTES, OTHER_FILES
    text_bytes, shards = 0, 0
    if asked.makes_corpus:
        with suppress(NanochatError):
            text_bytes = sum(file.stat().st_size for file in find_text_files(Path(asked.config.data))[0])
        needed += text_bytes
    elif corpus := asked.manifest(asked.workspace.base_data):
        text_bytes, shards = _text_bytes(corpus), len(corpus["files"])
    if "tokenize" in asked.chosen and asked.manifest(asked.workspace.tokens) is None:
        needed += int(text_bytes * TOKEN_BYTES_PER_TEXT_BYTE)
        files += 3 * shards
    try:
        size = checkpoint_bytes(asked.shape)
    except UsageError:
        return needed, files
    for stage in [stage for stage in MODEL_STAGES if stage in asked.chosen]:
        keep = (asked.config.base if stage == "base" else asked.chat(stage)).keep_checkpoints
        folder = asked.workspace.checkpoints(stage, asked.config.base.tag)
        there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        # The next one is written before the oldest is removed.
        needed += max(0, (keep + 1) * size - there)
    return needed, files


def checkpoint_bytes(shape: ModelConfig) -> int:
    """Size of a checkpoint: float32 weights, with Muon's momentum or AdamW's two moments for each."""
    counts = parameter_counts(shape)
    return 8 * counts["matrices"] + 12 * (counts["total"] - counts["matrices"])


def _recipe_if_sound(asked: Request) -> Recipe | None:
    """The recipe, for checks that have nothing to add where the model's own check finds it wrong."""
    try:
        return asked.recipe
    except NanochatError:
        return None


def _newest(folder: Path) -> tuple[dict[str, Any] | None, int]:
    """The configuration and the step of the newest checkpoint, None and 0 if there is none."""
    steps = list_steps(folder)
    if not steps:
        return None, 0
    newest = checkpoint_folder(folder, steps[-1])
    read_manifest(newest, CHECKPOINT_KIND, FIX_CHECKPOINT)
    config: dict[str, Any] = read_json(newest / "config.json", FIX_CHECKPOINT)
    return config, steps[-1]


def _known_identity(asked: Request, stage: Stage) -> dict[str, Any]:
    """As much of what decides a stage's weights as is known before it runs."""
    known: dict[str, Any] = {}
    if "tokenizer" not in asked.chosen and (tokenizer := asked.manifest(asked.workspace.tokenizer)):
        known["tokenizer"] = tokenizer["tokenizer_fingerprint"]
    if stage == "base":
        tokens = asked.manifest(asked.workspace.tokens)
        if tokens and "tokenize" not in asked.chosen:
            known["data"] = split_fingerprint(tokens, "train")
        if recipe := _recipe_if_sound(asked):
            return {**known, **base_identity(asked.config.base, asked.shape, recipe)}
        return {**known, **identity_fields(dataclasses.asdict(asked.config.base))}
    chat = asked.chat(stage)
    if chat.source not in asked.chosen:
        before = asked.workspace.checkpoints(chat.source, asked.config.base.tag)
        for step in list_steps(before)[-1:]:
            found = asked.manifest(checkpoint_folder(before, step))
            known |= {"source_checkpoint": tensors_fingerprint(found)} if found else {}
    return {**known, **identity_fields(dataclasses.asdict(chat)), "tasks": list(chat.tasks)}


def _steps_and_batch(asked: Request, stage: Stage, recipe: Recipe) -> tuple[int | None, int]:
    """How many steps a stage takes, None while that depends on conversations not made yet, of how many tokens."""
    if stage == "base":
        return recipe.num_steps, recipe.total_batch_size
    chat = asked.chat(stage)
    batch = chat_batch_size(chat, recipe.total_batch_size, asked.config.base.sequence_len)
    made = asked.manifest(asked.workspace.conversation_tokens(stage))
    if chat.num_steps is None and made and made.get("made_from", {}).get("tasks") == list(chat.tasks):
        return math.ceil((chat.target_epochs or 1.0) * made["totals"]["train"]["tokens"] / batch), batch
    return chat.num_steps, batch


def _text_bytes(corpus: dict[str, Any]) -> int:
    return sum(totals["text_bytes"] for totals in corpus["totals"].values())


def _quota_of(folder: Path) -> str:
    """What the commands for quotas say of a folder; nothing where there is none, as in most containers."""
    listing = ""
    for command in (
        ["lfs", "quota", "-q", "-u", str(os.getuid()), str(folder)],
        ["quota", "--raw-grace", "--no-wrap", "-f", _mount_of(folder)[0]],
    ):
        # `quota` ends with 1 where a limit is exceeded, which is when its listing matters.
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=QUOTA_SECONDS, check=False)
            listing += done.stdout
    return listing


def _quota_rows(listing: str) -> Iterator[tuple[int, ...]]:
    """Used, soft and hard limit in KiB, and the same in files, of each row; a star marks what is exceeded."""
    for line in listing.splitlines():
        cells = [cell.strip("*[]") for cell in line.split()]
        if len(cells) >= 8 and all(cell.isdigit() for cell in (*cells[1:4], *cells[5:8])):
            yield tuple(map(int, (*cells[1:4], *cells[5:8])))


def _mount_of(folder: Path) -> tuple[str, str]:
    """Mount point and kind of the file system that a folder is, or would be, on."""
    best = ("/", "")
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return best
    for line in mounts.splitlines():
        _, point, system, *_ = line.split()
        # Later mounts hide earlier ones. Blanks in a path are written as octal numbers.
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, system)
    return best


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        subject: what it is about.
        run: makes it.
        functions: what `run` leaves it to, beside the code of its own: their findings and errors are its findings.
        fix: what it gives to those of them that take the command that mends it.
        state: what their errors are.
    """

    subject: str
    run: Callable[[Request], Iterable[Finding]]
    functions: tuple[Callable[..., Any], ...] = ()
    fix: str = ""
    state: str = "PROBLEM"


MANIFESTS = (read_manifest, read_json)
FILES = (*MANIFESTS, verify_files)
CHECKS = (
    Check("run name", check_run, (check_run_name, check_name)),
    Check("stages", check_stages, (stage_names,)),
    Check(
        "model", check_model, (check_name, model_from_depth, ModelConfig.__post_init__, check_fp8_sizes, make_recipe)
    ),
    Check("processes", check_processes, (check_ranks, chat_batch_size)),
    Check("data", check_data, (find_text_files, open_corpus, *FILES), FIX_CORPUS),
    Check("tokenizer", check_tokenizer, (check_tokenizer_settings, split_pattern, *FILES), FIX_TOKENIZER),
    Check("tokens", check_tokens, FILES, TOKENIZE_COMMAND),
    Check(
        "task data",
        check_task_data,
        (parse_mixture, check_task_name, check_mixtures, describe_task, HubDataset.files, read_conversations),
    ),
    Check("staged files", check_staged, (check_inventory, read_json, verify_files), "<command>", "PROBLEM or note"),
    Check("stage before", check_sources, MANIFESTS, FIX_CHECKPOINT),
    Check("checkpoints", check_checkpoints, (refuse_other_run, *MANIFESTS), FIX_CHECKPOINT),
    Check("W&B", check_tracking, (check_wandb, check_key, check_folder, check_shared), FIX_WANDB_DIR),
    Check("NANOCHAT_BASE_DIR", check_workspace, (check_folder, check_quota, check_shared), FIX_BASE_DIR),
    Check("caches", check_cache_folders, (check_caches, check_folder), "export <name>=<folder>"),
    Check("time", check_time, (parse_time_limit, check_first_save)),
)
