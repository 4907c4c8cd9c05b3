"""Text and conversations: from their sources to token shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from nanochat.config import TrainMidConfig, TrainSFTConfig
from nanochat.workspace import Workspace

if TYPE_CHECKING:
    from nanochat.corpus.preparation import Preparation
    from nanochat.corpus.sources import SourceRequest


@dataclass(frozen=True)
class SourceSettings:
    """Where the rows of a large corpus are."""

    dataset: str | None = None
    """OWNER/NAME of a data set on the hub; or"""
    source: str | None = None
    """a folder with .parquet files, or an address that fsspec opens."""
    config: str | None = None
    """part of the data set, as its card says, or the name of a folder; default: the card's, or all."""
    split: str | None = None
    """of the data set; default: train of one on the hub, everything of a folder."""
    revision: str = "main"
    """branch, tag or commit of the data set."""

    def request(self) -> "SourceRequest":
        """The same for the corpus room."""
        from nanochat.corpus.sources import SourceRequest

        return SourceRequest(self.dataset, self.source, self.config, self.split, self.revision)


@dataclass(frozen=True)
class CorpusSettings:
    """How a corpus is cut, where it goes, and how it is made."""

    rows_per_shard: int = 14_000
    """documents per shard."""
    validation_rows: int = 10_000
    """documents set aside for validation, at most a tenth of all."""
    output: Path | None = None
    """folder of the corpus; default: base_data."""
    workers: int | None = None
    """processes, and downloads at once; default: one per core."""
    force: bool = False
    """replace a corpus that is there, even one in use; says by whom."""

    @property
    def folder(self) -> Path:
        """Where the corpus goes."""
        return self.output or Workspace.from_environment().base_data


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


def subset(
    rows: OmitArgPrefixes[SourceSettings],
    corpus: OmitArgPrefixes[CorpusSettings],
    *,
    ratio: float,
    seed: int = 42,
    columns: str = "text,token_count",
    part: str | None = None,
) -> None:
    """Write base_data from a random share of the rows of a large corpus; carries on where it was stopped.

    Which rows depends on the seed, the names of the source's files and the rows' numbers in them, and on nothing else.

    Args:
        rows: where they are.
        corpus: how it is cut, where it goes, and how it is made.
        ratio: share of the rows to keep, above 0 and at most 1.
        seed: chooses the rows, and the validation documents among them.
        columns: what to keep, separated by commas; nothing else is fetched or decoded.
        part: I/N reads only every N-th file, from the I-th on; after all parts, the command without it completes.
    """
    from nanochat.corpus.preparation import finished_manifest, make_part
    from nanochat.corpus.sampling import prepare_subset
    from nanochat.tracking.console import Console

    preparation = prepare_subset(
        corpus.folder,
        rows.request(),
        ratio=ratio,
        seed=seed,
        columns=tuple(columns.split(",")),
        rows_per_shard=corpus.rows_per_shard,
        validation_rows=corpus.validation_rows,
    )
    if part is None:
        _complete_corpus(preparation, corpus)
    elif finished_manifest(preparation, corpus.force) is None:
        make_part(preparation, part, corpus.workers, Console().progress)


def rank(
    rows: OmitArgPrefixes[SourceSettings],
    corpus: OmitArgPrefixes[CorpusSettings],
    *,
    by: str,
    top: float | None = None,
    sort: bool = False,
    descending: bool = True,
    seed: int = 42,
    columns: str = "text,token_count",
) -> None:
    """Write base_data from the best rows of a scored corpus, or sort it; carries on where it was stopped.

    Args:
        rows: where they are.
        corpus: how it is cut, where it goes, and how it is made.
        by: columns of numbers, separated by commas; the first decides, the others where it is equal.
        top: share of the rows to keep, above 0 and at most 1, in the order of the source; or
        sort: keep all, the best first.
        descending: the highest are best; nulls come last either way.
        seed: chooses the validation documents.
        columns: what to keep, separated by commas; nothing else is fetched or decoded, but the columns to rank by.
    """
    from nanochat.corpus.preparation import finished_manifest
    from nanochat.corpus.ranking import prepare_ranking, read_keys
    from nanochat.errors import UsageError
    from nanochat.tracking.console import Console

    if (top is None) != sort:
        raise UsageError("what to do with the ranked rows is not clear", "give either --top SHARE or --sort")
    preparation, ranking = prepare_ranking(
        corpus.folder,
        rows.request(),
        by=tuple(by.split(",")),
        descending=descending,
        top=top,
        columns=tuple(columns.split(",")),
        rows_per_shard=corpus.rows_per_shard,
        validation_rows=corpus.validation_rows,
        seed=seed,
    )
    if finished_manifest(preparation, corpus.force) is None:
        ranked, kept, unscored = read_keys(preparation, ranking, corpus.workers, Console().progress)
        print(f"keeping {kept:,} of {ranked:,} rows", flush=True)
        if unscored:
            Console().warning(f"{unscored:,} of these have no number in {by.split(',')[0]!r}: they come last")
    _complete_corpus(preparation, corpus)


def download(
    name: Positional[Literal["climbmix", "fineweb-edu"]],
    /,
    *,
    shards: str = "",
    revision: str = "main",
    workers: int = 8,
) -> None:
    """Download a standard pretraining set to base_data, checked; carries on where it was stopped, and adds shards.

    The validation shard always comes too.

    Args:
        name: which set: climbmix, 6543 shards, or fineweb-edu, 1823 shards, of about 100 MB each.
        shards: FIRST-LAST of the training shards; default: all.
        revision: branch, tag or commit of the data set.
        workers: files at once.
    """
    from nanochat.corpus.download import download_corpus
    from nanochat.tracking.console import Console

    folder = Workspace.from_environment().base_data
    _describe_corpus(download_corpus(name, shards, folder, workers, Console().progress, revision))


def azure(
    corpus: OmitArgPrefixes[CorpusSettings],
    *,
    container: str,
    prefix: str = "",
    account: str | None = None,
    credentials: Path | None = None,
    mode: Literal["bulk", "stream"] = "stream",
    skip_download: bool = False,
    columns: str = "text",
    seed: int = 42,
) -> None:
    """Write base_data from all rows of the .parquet files in an Azure container; carries on where it was stopped.

    Who asks is told by AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_SAS_URL, AZURE_STORAGE_SAS_TOKEN or
    AZURE_STORAGE_KEY; without them the container must be public, or this machine have an identity that may read it.

    Args:
        corpus: how it is cut, where it goes, and how it is made.
        container: its name.
        prefix: folder in it, or one file; default: all of it.
        account: the storage account; default: AZURE_STORAGE_ACCOUNT, or what the credentials name.
        credentials: file of lines NAME=VALUE that sets those variables; only you may be able to read it.
        mode: stream reads the wanted columns where they are; bulk downloads the files first, and keeps them.
        skip_download: of bulk: use what was downloaded, without network.
        columns: what to keep, separated by commas.
        seed: chooses the validation documents.
    """
    import os

    from nanochat.corpus.azure import read_credentials
    from nanochat.corpus.download import prepare_azure
    from nanochat.identity import usable_cores
    from nanochat.tracking.console import Console

    if credentials is not None:
        read_credentials(credentials)
    if account is not None:
        os.environ["AZURE_STORAGE_ACCOUNT"] = account
    preparation = prepare_azure(
        corpus.folder,
        container,
        prefix,
        Workspace.from_environment().downloads,
        mode=mode,
        skip_download=skip_download,
        columns=tuple(columns.split(",")),
        rows_per_shard=corpus.rows_per_shard,
        validation_rows=corpus.validation_rows,
        seed=seed,
        workers=corpus.workers or usable_cores(),
        watch=Console().progress,
    )
    _complete_corpus(preparation, corpus)


def tokenize(*, workers: int | None = None) -> None:
    """Turn base_data into token shards, once, on CPU; carries on where it was stopped.

    Args:
        workers: processes; default: one per core.
    """
    from nanochat.data_stages import tokenize_stage

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
    from nanochat.data_stages import conversations_stage
    from nanochat.tracking.console import Console

    workspace = Workspace.from_environment()
    defaults = TrainMidConfig().tasks if stage == "mid" else TrainSFTConfig().tasks
    made = conversations_stage(stage, tasks or defaults, sequence_len, workspace, Console())
    print(f"{workspace.conversation_tokens(stage)}: fingerprint {made}")


@dataclass(frozen=True)
class Tasks:
    """The tasks of one stage."""

    tasks: tuple[str, ...] = ()
    """as the same flag of speedrun has them; default: its own."""


def stage(
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAMES ...]")] = (),
    /,
    *,
    mid: Tasks = Tasks(),
    sft: Tasks = Tasks(),
    evaluation: Annotated[Tasks, arg(name="eval")] = Tasks(),
    stages: tuple[str, ...] = (),
    pretraining: Literal["climbmix", "fineweb-edu"] | None = None,
    shards: str = "",
    revision: str = "main",
    workers: int = 4,
) -> None:
    """Download what a run will need where there is no network, and list it in inventory.json; what is there is kept.

    Args:
        names: of tasks, `core` for the problems that base models are examined with, or `encodings` for the vocabularies
            that tokenizers are compared with; default: all that the run reads.
        mid: midtraining.
        sft: supervised finetuning.
        evaluation: what the models are examined with.
        stages: which stages will run, of tokenizer,base,mid,sft,eval; default: all.
        pretraining: also a standard set of text, as data download brings it.
        shards: of that, FIRST-LAST of the training shards; default: all.
        revision: branch, tag or commit of the data sets behind tasks.
        workers: files at once.
    """
    from nanochat.config import EvalConfig, RunConfig, TokenizerConfig, TrainBaseConfig, stage_names
    from nanochat.corpus.download import download_corpus
    from nanochat.errors import UsageError
    from nanochat.tasks.inventory import add_to_inventory
    from nanochat.tasks.staging import names_of_run
    from nanochat.tasks.staging import stage as stage_names_given
    from nanochat.tracking.console import Console

    workspace, progress = Workspace.from_environment(), Console().progress
    if pretraining is None and shards:
        raise UsageError(f"--shards {shards} are of no set", "name it: --pretraining climbmix")
    if not names:
        config = RunConfig(
            run="stage",
            data="existing",
            tokenizer=TokenizerConfig(),
            base=TrainBaseConfig(),
            mid=TrainMidConfig(tasks=mid.tasks or TrainMidConfig().tasks),
            sft=TrainSFTConfig(tasks=sft.tasks or TrainSFTConfig().tasks),
            evaluation=EvalConfig(tasks=evaluation.tasks),
        )
        names = tuple(names_of_run(config, stage_names(stages), workspace.task_data))
    if pretraining is not None:
        manifest = download_corpus(pretraining, shards, workspace.base_data, workers, progress)
        command = f"nanochat data download {pretraining} {f'--shards {shards}' if shards else ''}".rstrip()
        folder, files = workspace.base_data, manifest["files"]
        add_to_inventory(workspace.inventory, "pretraining", command, folder, manifest["source"], files)
        print(f"pretraining: {folder} ({len(files)} shards)", flush=True)
    for staged in stage_names_given(names, workspace, progress, revision=revision, workers=workers):
        print(f"{staged.name}: {staged.folder} ({staged.note})", flush=True)
    print(f"inventory: {workspace.inventory}")


def inspect(folder: Annotated[Positional[Path | None], arg(metavar="[FOLDER]")] = None, /, *, samples: int = 3) -> None:
    """Say what is in a folder of parquet files: rows, tokens, row groups, lengths, who reads it, and a few texts.

    Args:
        folder: with everything below it; default: base_data.
        samples: how many texts to show.
    """
    from nanochat.corpus import inspection
    from nanochat.corpus.shards import say_source
    from nanochat.tracking.console import Console, format_bytes, format_count

    folder = folder or Workspace.from_environment().base_data
    found = inspection.inspect(folder, samples)
    tokens = "" if found.tokens is None else f", {format_count(found.tokens)} tokens"
    rows, size = format_count(sum(found.rows.values())), format_bytes(sum(found.bytes.values()))
    print(f"{folder}: {len(found.rows)} files, {rows} rows, {size}{tokens}")
    if found.manifest is not None:
        print(f"manifest: fingerprint {found.manifest.get('fingerprint')}, source {say_source(found.manifest)}")
    for lease in found.leases:
        print(f"in use by {lease}{', which is gone' if lease.is_stale else ''}")
    groups = sorted(found.groups.values())
    print(f"row groups per file: {groups[0]} at least, {groups[len(groups) // 2]} median, {groups[-1]} at most")
    if groups[0] < inspection.FEWEST_GROUPS:
        few = [name for name, count in found.groups.items() if count < inspection.FEWEST_GROUPS]
        Console().warning(
            f"{len(few)} files, {few[0]} among them, have less than {inspection.FEWEST_GROUPS} row groups: other "
            "trainers leave ranks without data; this one reads them as well as any"
        )
    histogram = inspection.length_histogram(found.characters)
    for least, count in histogram:
        share = count / len(found.characters)
        print(f"{least:>9,} – {2 * least - 1:>9,} characters {share:6.1%} {'█' * round(50 * share)}".rstrip())
    for text in found.samples:
        print(f"sample: {text[:400]!r}")


def verify(folder: Annotated[Positional[Path | None], arg(metavar="[FOLDER]")] = None, /, *, workers: int = 8) -> None:
    """Read every byte of a folder that has a manifest, and name all files that are damaged or missing.

    It ends with exit code 4 if there are any.

    Args:
        folder: of any kind: corpus, tokens, tokenizer, a checkpoint; default: base_data.
        workers: files read at once.
    """
    from nanochat.corpus import inspection
    from nanochat.errors import DataError
    from nanochat.tracking.console import Console, format_bytes

    folder = folder or Workspace.from_environment().base_data
    manifest, damaged = inspection.verify(folder, workers, Console().progress)
    for wrong in damaged.values():
        print(wrong)
    files = manifest["files"]
    if damaged:
        raise DataError(
            f"{len(damaged)} of {len(files)} files in {folder} are damaged or missing: {', '.join(damaged)}",
            f"copy them again, or make the folder anew: {inspection.made_again_by(folder, manifest)}",
        )
    size = format_bytes(sum(entry["bytes"] for entry in files))
    print(f"{folder}: all {len(files)} files are whole, {size}, fingerprint {manifest['fingerprint']}")


def transfer(folder: Positional[Path], target: Annotated[Positional[str], arg(metavar="TARGET")], /) -> None:
    """Print the commands that bring a folder of data to another host and verify it there; none is run.

    Args:
        folder: of any kind that has a manifest.
        target: HOST:PATH, or USER@HOST:PATH.
    """
    from nanochat.corpus.inspection import transfer_commands

    print(" && \\\n".join(transfer_commands(folder, target)))


def _complete_corpus(preparation: "Preparation", corpus: CorpusSettings) -> None:
    """Make a corpus, unless it is there, and say what it holds."""
    from nanochat.corpus.preparation import complete, finished_manifest
    from nanochat.tracking.console import Console

    console = Console()
    manifest = finished_manifest(preparation, corpus.force)
    if manifest is None:
        manifest = complete(preparation, corpus.workers, console.progress, force=corpus.force, report=console.warning)
    _describe_corpus(manifest, preparation.folder)


def _describe_corpus(manifest: dict[str, Any], folder: Path | None = None) -> None:
    """Say what a corpus holds, by default that in base_data."""
    from nanochat.tracking.console import format_bytes, format_count

    for split, totals in manifest["totals"].items():
        print(f"{split}: {format_count(totals['rows'])} documents, {format_bytes(totals['text_bytes'])}")
    print(f"{folder or Workspace.from_environment().base_data}: fingerprint {manifest['fingerprint']}")
