"""Corpora from elsewhere: the field's standard sets by name, and parquet files in Azure."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanochat.corpus import azure
from nanochat.corpus.fetch import Advance, in_parallel, matches
from nanochat.corpus.hub import HubRepository, download_from, open_repository
from nanochat.corpus.preparation import Preparation, Watch, prepare
from nanochat.corpus.sampling import Draw
from nanochat.corpus.shards import (
    TEXT_COLUMN,
    Split,
    corpus_totals,
    describe_shard,
    open_corpus,
    say_source,
    shard_name,
)
from nanochat.corpus.sources import AZURE_SCHEME, Source, SourceRequest
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import MANIFEST_NAME, lock_folder, read_manifest, refuse_if_used, write_manifest

SetName = Literal["climbmix", "fineweb-edu"]
Mode = Literal["bulk", "stream"]


@dataclass(frozen=True)
class StandardSet:
    """Shards that were shuffled and cut for pretraining, on the hub; the last one is the validation set.

    Attributes:
        repository: where they are.
        num_shards: how many there are.
    """

    repository: str
    num_shards: int


# Both from karpathy/nanochat, nanochat/dataset.py, at different times.
STANDARD_SETS: dict[SetName, StandardSet] = {
    "climbmix": StandardSet("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": StandardSet("karpathy/fineweb-edu-100b-shuffle", 1823),
}


def parse_shards(text: str, num_shards: int) -> range:
    """Read a range of training shards, `A-B` with both ends, or `A`; empty for all.

    Raises:
        UsageError: it is none, or leads beyond the last training shard.
    """
    last = num_shards - 2
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text or f"0-{last}")
    if match is None or not int(match[1]) <= int(match[2] or match[1]) <= last:
        raise UsageError(
            f"--shards {text} is not a range of training shards",
            f"give FIRST-LAST of 0-{last}; the validation shard, {last + 1}, always comes too",
        )
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def download_corpus(
    name: SetName, shards: str, folder: Path, workers: int, watch: Watch, revision: str = "main"
) -> dict[str, Any]:
    """Download shards of a standard set and the validation shard, and write their manifest; what is there is kept.

    More shards can be added later: those that are there stay, at the commit that they came from.

    Args:
        shards: which for training, `A-B`; empty for all.
        folder: where the corpus is or will be.
        workers: files at once.
        watch: shows bytes.
        revision: branch, tag or commit.

    Returns:
        The manifest. If it lists all that was asked for already, nothing is asked of the hub.

    Raises:
        UsageError: `folder` holds another corpus, or is in use and more shards were asked for.
        DataError: a shard is damaged, twice.
        NanochatError: the hub cannot be reached or refuses, or there is no room.
    """
    chosen = STANDARD_SETS[name]
    wanted = {*parse_shards(shards, chosen.num_shards), chosen.num_shards - 1}
    present = _present(folder, name, revision)
    if present is not None:
        had = set(present["source"]["shards"])
        if wanted <= had:
            return present
        refuse_if_used(folder, str(folder))
        wanted |= had
        revision = present["source"]["revision"]
    # Before the folder is made: without network nothing must be left behind that others take for a corpus.
    repository = open_repository(chosen.repository, revision)
    names = [shard_name(index) for index in sorted(wanted)]
    sizes = {file: repository.remote(file).size for file in names}
    missing = sum(size for file, size in sizes.items() if not (folder / file).exists())
    with lock_folder(folder, str(folder)):
        _check_room(folder, missing)
        files = _bring(repository, names, folder, workers, watch)
        source = {
            "name": name,
            "dataset": chosen.repository,
            "revision": repository.commit,
            "shards": sorted(wanted),
        }
        write_manifest(
            folder, "corpus", files, schema={TEXT_COLUMN: "string"}, totals=corpus_totals(files), source=source
        )
    return open_corpus(folder, "run the same command again").manifest


def prepare_azure(
    folder: Path,
    container: str,
    prefix: str,
    downloads: Path,
    *,
    mode: Mode,
    skip_download: bool,
    columns: tuple[str, ...],
    rows_per_shard: int,
    validation_rows: int,
    seed: int,
    workers: int,
    watch: Watch,
) -> Preparation:
    """Plan a corpus of all rows of the parquet files in a container, downloading them first or not.

    Args:
        folder: where the corpus will be.
        prefix: the folder in the container, or one file.
        downloads: where whole files are put, of `bulk`.
        mode: `bulk` downloads the files, then reads them; `stream` reads only the columns, where they are.
        skip_download: use what was downloaded, and ask nothing of the service.
        columns, rows_per_shard, validation_rows, seed: see `Preparation`.
        workers: files downloaded at once.
        watch: shows bytes.

    Raises:
        UsageError: the request makes no sense, or there is no such thing.
        DataError: a file changed or was damaged on its way.
        NanochatError: the container cannot be reached, or refuses.
    """
    container, prefix = azure.check_container(container), prefix.strip("/")
    place = f"{AZURE_SCHEME}{container}/{prefix}".rstrip("/")
    if skip_download and mode == "stream":
        raise UsageError("--skip-download skips nothing where nothing is downloaded", "give --mode bulk")
    if mode == "bulk":
        here = downloads / "azure" / container
        place = str(here / prefix)
        if not skip_download:
            blobs = azure.list_blobs(container, prefix)
            size = sum(blob.size for blob in blobs)
            with lock_folder(here, str(here)), watch(f"{container}/{prefix} (bytes)", size) as shown:
                _check_room(here, sum(blob.size for blob in blobs if not (here / blob.name).exists()))
                azure.download_blobs(container, blobs, here, workers, shown.advance)
                azure.forget_others(Path(place), here, blobs)
        account = azure.downloaded_from(Path(place))
    else:
        account = azure.account_name(container)
    draw = Draw(1.0, seed)
    return prepare(
        folder,
        _AzureRequest(place=place, account=account, container=container, prefix=prefix),
        lambda source: draw,
        draw.describe(),
        title="azure",
        columns=columns,
        rows_per_shard=rows_per_shard,
        validation_rows=validation_rows,
        seed=seed,
    )


@dataclass(frozen=True)
class _AzureRequest(SourceRequest):
    """Files that are or were in a container. Attributes as in the manifest."""

    account: str = ""
    container: str = ""
    prefix: str = ""

    def list(self) -> Source:
        origin = {"account": self.account, "container": self.container, "prefix": self.prefix}
        return replace(super().list(), origin=origin)


def _present(folder: Path, name: str, revision: str) -> dict[str, Any] | None:
    """The manifest of what was downloaded of this set before, if the files it lists are there."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(folder, "corpus", f"rm -r {folder}, then run this again")
    source = manifest.get("source", {})
    if source.get("name") != name or revision not in ("main", source.get("revision")):
        raise UsageError(
            f"{folder} already holds another corpus (from {say_source(manifest)})",
            f"set NANOCHAT_BASE_DIR to another folder, or remove this corpus: rm -r {folder}",
        )
    try:
        return open_corpus(folder, "").manifest
    except DataError:
        # A shard has gone or is cut short: bringing it again mends that.
        (folder / MANIFEST_NAME).unlink()
        return None


def _bring(
    repository: HubRepository, names: Sequence[str], folder: Path, workers: int, watch: Watch
) -> list[dict[str, Any]]:
    fix = "delete it and run the same command again"

    def bring(name: str, advance: Advance) -> dict[str, Any]:
        split: Split = "val" if name == names[-1] else "train"
        # What lies there may be of another commit, or damaged since.
        if (folder / name).is_file() and not matches(repository.remote(name), folder / name):
            (folder / name).unlink()
        return describe_shard(download_from(repository, name, folder, advance), split, fix)

    size = sum(repository.files[name].size for name in names)
    with watch(f"{repository.name} (bytes)", size) as shown:
        entries = {entry["name"]: entry for entry in in_parallel(bring, names, workers, shown.advance)}
    return [entries[name] for name in names]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NanochatError(
            f"{folder} needs {needed / 2**30:.1f} GiB, and its disk has {free / 2**30:.1f} GiB left",
            "ask for fewer, or set NANOCHAT_BASE_DIR to a larger disk",
        )
