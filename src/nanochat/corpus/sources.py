"""Parquet files wherever they lie: on the Hugging Face hub, in a folder, or at any address that fsspec opens.

Only the wanted columns are read. A published corpus often carries an embedding that is larger than its text, and the
usual readers fetch it all the same, since their read-ahead bridges the gaps between the columns that were asked for.
Here each row group costs a request per stretch of wanted columns and not a byte more; where the gaps are too small for
that to pay, the file is fetched whole.
"""

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.corpus.shards import TEXT_COLUMN, TEXT_FIELD
from nanochat.errors import DataError, NanochatError, UsageError

HUB_SCHEME = "hf://"
AZURE_SCHEME = "azure://"
# Decoded at once; a larger row group is read in slices, which costs more time and less memory.
LARGEST_GROUP_BYTES = 64 * 2**20
SLICE_ROWS = 1024
SLICE_BUFFER_BYTES = 2**20
# A request takes as long as so many bytes: 20 ms at 50 MB/s.
REQUEST_BYTES = 2**20
# Holds most footers, so that one request fetches them.
TAIL_BYTES = 2**16
FOOTER_END = b"PAR1"
LISTING_THREADS = 8
OTHER_COLUMNS = "choose others with --columns, or --by for those to rank by"
RENAME_TEXT = f"rename the column of texts to {TEXT_COLUMN!r}, or: nanochat data local FOLDER --text-column NAME"


@dataclass(frozen=True)
class SourceFile:
    """One parquet file.

    Attributes:
        name: relative to its source, the same on the hub and in a copy of the repository.
        bytes: its size.
        version: tells another content under the same name: the hub's checksum, or the digest of the parquet footer.
    """

    name: str
    bytes: int
    version: str


@dataclass(frozen=True)
class Source:
    """Parquet files below one place.

    Attributes:
        place: a folder or an address.
        origin: the place as a manifest should name it: no path of this machine, no secret.
        files: in the order of their names.
    """

    place: str
    origin: dict[str, Any]
    files: tuple[SourceFile, ...]

    @property
    def is_on_hub(self) -> bool:
        """Whether the files have checksums of the hub and may be downloaded from it."""
        return self.place.startswith(HUB_SCHEME)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder that is read, if it is one of this machine."""
        return () if "://" in self.place else (Path(self.place).expanduser(),)

    def as_json(self) -> dict[str, Any]:
        """To be read back by `source_from_json`."""
        return asdict(self)


def source_from_json(value: dict[str, Any]) -> Source:
    """The source that `Source.as_json` described."""
    return Source(value["place"], value["origin"], tuple(SourceFile(**file) for file in value["files"]))


@dataclass(frozen=True)
class SourceRequest:
    """Where rows are asked from.

    Attributes:
        dataset: OWNER/NAME on the hub; or
        place: a folder, an address of one, or of one parquet file.
        config: the part of it, as its card says, or else the name of a folder; by default the part that the card
            calls the default, or else all.
        split: as the card says, or else how the names of its files begin; by default `train` of a data set, and
            everything of a folder.
        revision: branch, tag or commit of the data set.
    """

    dataset: str | None = None
    place: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str = "main"

    def list(self) -> Source:
        """Look up the files.

        Raises:
            UsageError: there is nothing of that name.
            NanochatError: it cannot be reached.
        """
        if self.dataset is not None:
            return _hub_source(self.dataset, self.config, self.split or "train", self.revision)
        return _folder_source(str(self.place), self.config, self.split)


def _hub_source(repository: str, config: str | None, split: str, revision: str) -> Source:
    from nanochat.corpus.hub import hub_api, hub_errors

    with hub_errors(f"{repository} at {revision} was not listed"):
        info = hub_api().dataset_info(repository, revision=revision, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or () if file.rfilename.endswith(".parquet")}
    patterns = _card_patterns((info.card_data or {}).get("configs") or [], config, split, repository)
    if patterns is None:
        names = _chosen(siblings, config, split, repository)
    else:
        names = [name for name in sorted(siblings) if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not names:
            raise UsageError(
                f"{repository} has no parquet files {patterns[0]}, as its card says", "choose a --revision"
            )
    files = []
    for name in names:
        lfs = siblings[name].lfs
        version = lfs.sha256 if lfs else siblings[name].blob_id
        files.append(SourceFile(name, int(siblings[name].size or 0), str(version)))
    origin = {"dataset": repository, "revision": info.sha, "config": config, "split": split}
    return Source(f"{HUB_SCHEME}datasets/{repository}@{info.sha}", origin, tuple(files))


def _card_patterns(
    configs: Sequence[dict[str, Any]], config: str | None, split: str, repository: str
) -> list[str] | None:
    """The patterns of files that a data set's card names for a config and split; None if it names no configs."""
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs if entry.get("data_files")}
    if not by_name:
        return None
    if config is not None and config not in by_name:
        some = ", ".join(list(by_name)[:8]) + (", …" if len(by_name) > 8 else "")
        raise UsageError(f"{repository} has no config {config!r}", f"choose one with --config: {some}")
    # Where no part is the default one, as with a corpus divided by crawl, all of them are meant.
    default = [name for name, entry in by_name.items() if entry.get("default") or name == "default"]
    patterns: dict[str, list[str]] = {}
    for name in [config] if config is not None else default or list(by_name):
        data_files = by_name[name]["data_files"]
        for entry in data_files if isinstance(data_files, list) else [data_files]:
            of_split, path = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
            patterns.setdefault(str(of_split), []).extend([path] if isinstance(path, str) else path)
    if split not in patterns:
        raise UsageError(f"{repository} has no split {split!r}", f"choose one with --split: {', '.join(patterns)}")
    return patterns[split]


def _folder_source(place: str, config: str | None, split: str | None) -> Source:
    file_system, root = _file_system(place)
    with _reaching(place):
        found = file_system.find(root, detail=True)
    asked, sizes = place, {}
    # An address of one file.
    if list(found) == [root]:
        place, root = place.rpartition("/")[0] or ".", root.rpartition("/")[0]
    for path, about in found.items():
        name = path.removeprefix(root).lstrip("/")
        if name.endswith(".parquet") and not any(part.startswith(".") for part in name.split("/")):
            sizes[name] = int(about["size"])
    if not sizes:
        raise UsageError(f"{asked} holds no .parquet files", "name a folder or an address that does with --source")
    names = _chosen(sizes, config, split, place)

    def describe(name: str) -> SourceFile:
        with _reaching(f"{place}/{name}"), file_system.open(f"{root}/{name}", **_exact_reads(file_system)) as stream:
            footer = _read_footer(stream, sizes[name], f"{place}/{name}")
        return SourceFile(name, sizes[name], _digest(footer))

    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        files = tuple(pool.map(describe, names))
    return Source(place, {"config": config, "split": split}, files)


def _chosen(names: Iterable[str], config: str | None, split: str | None, where: str) -> list[str]:
    """The files of a config and a split by the layout that most data sets have: CONFIG/SPLIT-00000-of-00009.parquet."""
    chosen = sorted(names)
    if config is not None:
        folders = sorted({part for name in chosen for part in name.split("/")[:-1]})
        chosen = [name for name in chosen if config in name.split("/")[:-1]]
        if not chosen:
            raise UsageError(
                f"{where} has no folder {config!r} with .parquet files",
                f"choose one with --config: {', '.join(folders[:8]) or 'there are none, leave it out'}",
            )
    if split is None:
        return chosen
    begins = re.compile(rf"{re.escape(split)}(?![A-Za-z])")
    of_split = [name for name in chosen if split in name.split("/") or begins.match(name.rpartition("/")[2])]
    if of_split or split != "train":
        chosen = of_split
    if not chosen:
        raise UsageError(f"{where} has no .parquet files of the split {split!r}", "choose another with --split")
    return chosen


@contextmanager
def open_parquet(source: Source, file: SourceFile, columns: Sequence[str], scratch: Path) -> Iterator[pq.ParquetFile]:
    """Open one file in order to read some of its columns.

    Args:
        scratch: a folder for a download, if that is cheaper than reading the columns where they are.

    Raises:
        DataError: it is damaged, not what it was when it was listed, or has no such columns.
        NanochatError: it cannot be reached.
    """
    file_system, root = _file_system(source.place)
    where = f"{source.place}/{file.name}"
    is_local = "file" in _protocols(file_system)
    with _reaching(where), file_system.open(f"{root}/{file.name}", **_exact_reads(file_system)) as stream:
        footer = _read_footer(stream, file.bytes, where)
        if not source.is_on_hub and _digest(footer) != file.version:
            raise DataError(f"{where} is not the file that was there when this work began", _begin_anew(scratch))
        metadata = _as_metadata(footer, where)
        _check_columns(metadata, columns, where)
        whole: AbstractContextManager[BinaryIO] = nullcontext(stream)
        if not is_local and _pays_to_download(metadata, columns, file.bytes):
            whole = _downloaded(source, file, scratch)
        largest = max(
            (_wanted_bytes(metadata, group, columns)[1] for group in range(metadata.num_row_groups)), default=0
        )
        in_slices = largest > LARGEST_GROUP_BYTES
        with (
            whole as content,
            _as_damage(where),
            pq.ParquetFile(
                content,
                metadata=metadata,
                pre_buffer=not in_slices,
                buffer_size=SLICE_BUFFER_BYTES if in_slices else 0,
                page_checksum_verification=True,
            ) as parquet,
        ):
            yield parquet


def read_tables(parquet: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns, in the order given, of at most one row group or LARGEST_GROUP_BYTES of rows at a time."""
    for group in range(parquet.num_row_groups):
        if _wanted_bytes(parquet.metadata, group, columns)[1] <= LARGEST_GROUP_BYTES:
            tables: Iterable[pa.Table] = [parquet.read_row_group(group, columns=list(columns), use_threads=False)]
        else:
            batches = parquet.iter_batches(SLICE_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
            tables = (pa.Table.from_batches([batch]) for batch in batches)
        for table in tables:
            yield table.select(list(columns)).replace_schema_metadata()


def column_fields(parquet: pq.ParquetFile, columns: Sequence[str]) -> list[pa.Field]:
    """Name and type of some columns; a text column is one of plain strings without nulls, as shards have it."""
    schema = parquet.schema_arrow
    return [TEXT_FIELD if name == TEXT_COLUMN else pa.field(name, schema.field(name).type) for name in columns]


def _wanted_bytes(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> tuple[int, int, int]:
    """Compressed and decoded bytes of some columns of a row group, and in how many stretches they lie."""
    row_group = metadata.row_group(group)
    compressed = decoded = stretches = 0
    was_wanted = False
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        is_wanted = column.path_in_schema.partition(".")[0] in columns
        if is_wanted:
            compressed += column.total_compressed_size
            decoded += column.total_uncompressed_size
            stretches += not was_wanted
        was_wanted = is_wanted
    return compressed, decoded, stretches


def _pays_to_download(metadata: pq.FileMetaData, columns: Sequence[str], size: int) -> bool:
    groups = [_wanted_bytes(metadata, group, columns) for group in range(metadata.num_row_groups)]
    return sum(compressed + stretches * REQUEST_BYTES for compressed, _, stretches in groups) > size + REQUEST_BYTES


@contextmanager
def _downloaded(source: Source, file: SourceFile, scratch: Path) -> Iterator[BinaryIO]:
    """The whole file in `scratch`, for as long as it is read. From the hub it comes verified by its checksum."""
    from nanochat.corpus.hub import download_file

    folder = scratch / hashlib.sha256(file.name.encode()).hexdigest()[:16]
    if source.is_on_hub:
        repository, _, revision = source.place.removeprefix(f"{HUB_SCHEME}datasets/").partition("@")
        path = download_file(repository, file.name, revision, folder)
    else:
        file_system, root = _file_system(source.place)
        path = folder / "download.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        file_system.get_file(f"{root}/{file.name}", str(path))
        if path.stat().st_size != file.bytes:
            raise NanochatError(f"{source.place}/{file.name} came incomplete", "run the same command again")
    try:
        with path.open("rb") as stream:
            yield stream
    finally:
        path.unlink(missing_ok=True)


def _read_footer(stream: BinaryIO, size: int, where: str) -> bytes:
    """The parquet footer with its length and mark."""
    broken = DataError(f"{where} is no whole parquet file", "copy or download it again, or take it out of the folder")
    stream.seek(max(0, size - TAIL_BYTES))
    tail = stream.read(min(size, TAIL_BYTES))
    if len(tail) < 12 or not tail.endswith(FOOTER_END):
        raise broken
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > size:
        raise broken
    if length > len(tail):
        stream.seek(size - length)
        tail = stream.read(length - len(tail)) + tail
    return tail[-length:]


def _as_metadata(footer: bytes, where: str) -> pq.FileMetaData:
    with _as_damage(where):
        return pq.read_metadata(pa.BufferReader(footer))


def _check_columns(metadata: pq.FileMetaData, columns: Sequence[str], where: str) -> None:
    schema = metadata.schema.to_arrow_schema()
    for name in columns:
        if name not in schema.names:
            other = RENAME_TEXT if name == TEXT_COLUMN else OTHER_COLUMNS
            raise UsageError(f"{where} has no column {name!r} (it has: {', '.join(schema.names) or 'none'})", other)
        kind = schema.field(name).type
        if name == TEXT_COLUMN and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(f"{where}: column {name!r} holds {kind}, not text", RENAME_TEXT)


def _digest(footer: bytes) -> str:
    return hashlib.sha256(footer).hexdigest()


def _begin_anew(scratch: Path) -> str:
    return f"begin anew: rm -r {scratch.parent}"


def _file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and the place's path in it."""
    if place.startswith(HUB_SCHEME):
        from nanochat.corpus.hub import hub_file_system

        return hub_file_system(), place.removeprefix(HUB_SCHEME)
    if place.startswith(AZURE_SCHEME):
        from nanochat.corpus.azure import BlobFileSystem

        return BlobFileSystem(), place.removeprefix(AZURE_SCHEME)
    if "://" not in place:
        return _LocalFiles(), str(Path(place).expanduser().absolute())
    import fsspec

    try:
        file_system, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{place} cannot be opened ({_first_line(error)})", "use another address") from None
    return file_system, str(root).rstrip("/")


class _LocalFiles:
    """Files of this machine, in fsspec's form: without its import, and without Python between them and the decoder."""

    protocol = "file"

    def find(self, root: str, detail: bool) -> dict[str, dict[str, int]]:
        """All files below a folder, or the one file; a link to nothing is one, which whoever opens it will miss."""
        below = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        files = sorted([Path(root)] if Path(root).is_file() else below)
        return {str(path): {"size": path.stat().st_size if path.exists() else 0} for path in files}

    def open(self, path: str) -> pa.OSFile:
        """One file."""
        return pa.OSFile(path, "rb")


def _protocols(file_system: Any) -> tuple[str, ...]:
    protocol = file_system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _exact_reads(file_system: Any) -> dict[str, Any]:
    """Options that make a read fetch what it asks for and no more."""
    return {} if "file" in _protocols(file_system) else {"block_size": TAIL_BYTES, "cache_type": "none"}


@contextmanager
def _reaching(where: str) -> Iterator[None]:
    """What is not reached is one line."""
    if where.startswith(HUB_SCHEME):
        from nanochat.corpus.hub import hub_errors

        with hub_errors(f"{where} was not read"):
            yield
        return
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{where} is not there", "check the name of --source") from None
    except NanochatError:
        raise
    except Exception as error:
        # What a lost connection raises is another thing in every file system. A full disk is told as it is.
        if isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and error.errno) or "://" not in where:
            raise
        raise NanochatError(
            f"{where} cannot be read ({_first_line(error)})", "check the address and the network, then run it again"
        ) from None


@contextmanager
def _as_damage(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{where} is damaged ({_first_line(error)})", "copy or download it again, or take it out of the folder"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
