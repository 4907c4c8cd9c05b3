"""From source files to a corpus, in two steps that may each be killed at any moment and done by many processes.

First every source file becomes a *piece*: the chosen rows of the wanted columns, uncompressed, whole or not there.
Which rows those are is up to a `Choice` and depends on nothing but the file and the row, so it does not matter who
makes a piece, when, and how often. Then the pieces are cut into shards of exactly the same number of rows, each
independent of all others. So the corpus has the same bytes however the work was divided and however often it was
interrupted.

The pieces stand between because the number of rows in a shard must be exact although empty texts are left out and the
validation rows, chosen by their texts, are taken from anywhere. Uncompressed, they cost a tenth of the time of writing
the shards, and any row of them can be picked without reading others. They take the room of the text as it is, in a
folder beside the corpus that goes when the corpus is complete.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat.corpus.shards import (
    LARGEST_VALIDATION_SHARE,
    TEXT_COLUMN,
    Split,
    corpus_totals,
    existing_manifest,
    shard_name,
    text_digest,
    write_shard,
)
from nanochat.corpus.sources import (
    Source,
    SourceFile,
    SourceRequest,
    column_fields,
    open_parquet,
    read_tables,
    source_from_json,
)
from nanochat.corpus.workers import run_tasks
from nanochat.errors import DataError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    Lease,
    fingerprint,
    lock_folder,
    read_json,
    refuse_if_used,
    remove_stale_temporaries,
    sync_folder,
    temporary_sibling,
    use_folders,
    whole_file,
    write_json,
    write_manifest,
)

Array = np.ndarray[Any, np.dtype[Any]]

# Raised when the same request would give other bytes than before, so that old pieces are made anew.
FORMAT = 1
PLAN_NAME = "plan.json"
VALIDATION_NAME = "validation.npy"
VALIDATION_TYPE = np.dtype([("piece", np.int64), ("row", np.int64), ("digest", np.uint64)])
PLACE_COLUMN = "__place"
SORTED_ROWS_AT_ONCE = 8192
OVERRIDE = "wait for it, or stop it, or override it with --force"


class Progress(Protocol):
    """Told of work that is done."""

    def advance(self, count: int = 1, **fields: Any) -> None:
        """So much more is done; `fields` are shown with it."""


# From what is being done and how much of it there is; `Console.progress` is one.
Watch = Callable[[str, int], AbstractContextManager[Progress]]


class Choice(Protocol):
    """Which rows of a source to keep. Picklable."""

    @property
    def run_bytes(self) -> int | None:
        """How many bytes of rows to sort at once; None where rows keep the order of their source."""

    def describe(self) -> dict[str, Any]:
        """All that the choice depends on but the source, JSON-able."""

    def of_file(self, index: int, file: SourceFile) -> Callable[[int, int], Array]:
        """A function of first row and number of rows: for consecutive rows of the file, what becomes of each.

        A mask of those to keep, or, with `run_bytes`, each row's place among all rows of the source.
        """


@dataclass(frozen=True)
class Preparation:
    """A corpus in the making.

    Attributes:
        folder: where the corpus will be.
        source: what it is made from.
        choice: which rows.
        columns: `text` and those to keep with it.
        rows_per_shard: of each training shard but the last.
        validation_rows: distinct documents for validation, at most a tenth of all.
        seed: decides which documents those are.
        title: what to call this kind of corpus in its manifest.
    """

    folder: Path
    source: Source
    choice: Choice
    columns: tuple[str, ...]
    rows_per_shard: int
    validation_rows: int
    seed: int
    title: str

    @property
    def work(self) -> Path:
        """The folder beside the corpus that everything unfinished is in."""
        return work_folder(self.folder)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the corpus' content, for its manifest."""
        files = [[file.name, file.bytes, file.version] for file in self.source.files]
        return {
            "source": {
                "name": self.title,
                **self.source.origin,
                **self.choice.describe(),
                "columns": list(self.columns),
                "files": len(files),
                "files_fingerprint": fingerprint(files),
            },
            "layout": {
                "rows_per_shard": self.rows_per_shard,
                "validation_rows": self.validation_rows,
                "seed": self.seed,
            },
        }

    @property
    def key(self) -> str:
        """Equal exactly where pieces and shards are."""
        return fingerprint([FORMAT, self.identity])

    def piece(self, index: int) -> Path:
        """The piece of a source file."""
        return self.work / "pieces" / f"{index:05d}.arrow"

    def receipt(self, index: int) -> Path:
        """What says that a piece is finished, and what is in it."""
        return self.piece(index).with_suffix(".receipt.json")


@dataclass(frozen=True)
class _PieceTask:
    preparation: Preparation
    index: int


@dataclass(frozen=True)
class _ShardTask:
    """One shard: the validation set, or rows `first` to `last` of those that remain for training.

    Attributes:
        pieces: which rows of which piece that is, as (piece, first, last) of its remaining rows; unused where the
            corpus is sorted and `first` and `last` are places.
    """

    preparation: Preparation
    index: int
    split: Split
    first: int
    last: int
    pieces: tuple[tuple[int, int, int], ...] = ()

    @property
    def path(self) -> Path:
        return self.preparation.work / "corpus" / shard_name(self.index)

    @property
    def receipt_path(self) -> Path:
        return self.preparation.work / "receipts" / f"{self.index:05d}.json"


def work_folder(folder: Path) -> Path:
    """Where everything unfinished of the corpus at `folder` is."""
    return folder.with_name(f"{folder.name}.unfinished")


def prepare(
    folder: Path,
    request: SourceRequest,
    choice: Callable[[Source], Choice],
    asked: dict[str, Any],
    *,
    title: str,
    columns: tuple[str, ...],
    rows_per_shard: int,
    validation_rows: int,
    seed: int,
) -> Preparation:
    """Plan a corpus, or join in where its making has begun.

    Args:
        folder: where the corpus will be.
        request: where its rows come from.
        choice: makes the choice of rows from the source.
        asked: what decides the choice but the source, JSON-able.
        title, columns, rows_per_shard, validation_rows, seed: see `Preparation`.

    Raises:
        UsageError: the request makes no sense, or unfinished work on another corpus is in the way.
        NanochatError: the source cannot be reached.
    """
    if (request.dataset is None) == (request.place is None):
        raise UsageError(
            "the rows have to come from one place", "give either --dataset OWNER/NAME or --source FOLDER_OR_URL"
        )
    if TEXT_COLUMN not in columns or len(set(columns)) < len(columns):
        raise UsageError(
            f"a corpus cannot have the columns {','.join(columns)}", f"name {TEXT_COLUMN!r} and each column once"
        )
    if rows_per_shard < 1 or validation_rows < 1:
        raise UsageError(
            f"a corpus with {rows_per_shard} rows per shard and {validation_rows} validation rows is empty",
            "ask for at least 1 of each",
        )
    folder = folder.resolve()
    if request.place is not None and folder.is_relative_to(Path(request.place).resolve()):
        raise UsageError(
            f"{folder} lies inside {request.place}: the corpus would be read as part of its own source",
            "choose another folder with --output",
        )
    layout = {"rows_per_shard": rows_per_shard, "validation_rows": validation_rows, "seed": seed}
    everything = {"title": title, **asdict(request), **asked, "columns": list(columns), **layout}

    def preparation(source: Source) -> Preparation:
        return Preparation(folder, source, choice(source), columns, rows_per_shard, validation_rows, seed, title)

    return preparation(_pinned_source(folder, everything, request.list, lambda source: _is_made(preparation(source))))


def _is_made(preparation: Preparation) -> bool:
    try:
        return existing_manifest(preparation.folder, preparation.identity) is not None
    except (UsageError, DataError):
        return False


def _pinned_source(
    folder: Path, request: dict[str, Any], list_source: Callable[[], Source], is_made: Callable[[Source], bool]
) -> Source:
    """The source of a corpus in the making: as its first process found it, for all that join in or carry on.

    Of a corpus that is there already nothing is written: it may lie where nothing can be.
    """
    work = work_folder(folder)
    path = work / PLAN_NAME
    if path.exists() and _is_other(path, request):
        if _has_begun(work):
            raise UsageError(
                f"{work} holds unfinished work on another corpus",
                f"choose another --output, or give that work up: rm -r {work}",
            )
        path.unlink()
    if not path.exists():
        source = list_source()
        if is_made(source):
            return source
        plan = {"format": FORMAT, "request": request, "source": source.as_json()}
        temporary = temporary_sibling(path)
        write_json(temporary, plan)
        # Unlike a rename, a link never replaces: the first of several parts decides for all.
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
        sync_folder(work)
    return source_from_json(read_json(path, f"begin anew: rm -r {work}")["source"])


def _has_begun(work: Path) -> bool:
    return any(work.glob("pieces/*.receipt.json")) or any(work.glob("keys/*.npy"))


def _is_other(path: Path, request: dict[str, Any]) -> bool:
    plan = read_json(path, f"begin anew: rm -r {path.parent}")
    return bool(plan.get("format") != FORMAT or fingerprint(plan.get("request")) != fingerprint(request))


def finished_manifest(preparation: Preparation, force: bool) -> dict[str, Any] | None:
    """The manifest of the corpus that was asked for if it is there already and whole.

    Args:
        force: another corpus at its place is going to be replaced, which is refused without. What is no corpus never
            is: the folder may have been named by mistake.
    """
    try:
        found = existing_manifest(preparation.folder, preparation.identity)
    except (UsageError, DataError) as error:
        is_corpus = (preparation.folder / MANIFEST_NAME).is_file()
        if force and is_corpus:
            return None
        if not _has_begun(preparation.work):
            shutil.rmtree(preparation.work, ignore_errors=True)
        replace = ", or replace it: the same command with --force" if is_corpus else ""
        raise type(error)(error.what, f"choose another --output{replace}") from None
    if found is not None:
        shutil.rmtree(preparation.work, ignore_errors=True)
    return found


def make_part(preparation: Preparation, part: str, workers: int | None, watch: Watch) -> None:
    """Make the pieces of some source files, which leaves the others to other processes, on other nodes perhaps.

    Args:
        part: I/N for every N-th file, beginning with the I-th.
        workers: processes; by default one per usable core.
        watch: shown how far it is.

    Raises:
        UsageError: there is no such part, or someone completes this corpus already.
        DataError, NanochatError: a source file is damaged or cannot be reached.
    """
    given = re.fullmatch(r"(\d+)/(\d+)", part)
    if not given or not 1 <= int(given[1]) <= int(given[2]):
        raise UsageError(f"{part!r} is no part", "give --part I/N with I from 1 to N, for example --part 3/8")
    lock_folder(preparation.work, str(preparation.folder)).close()
    with use_folders(f"part {part} of {preparation.folder}", preparation.work, *preparation.source.folders):
        _make_pieces(
            preparation, range(int(given[1]) - 1, len(preparation.source.files), int(given[2])), workers, watch
        )


def complete(
    preparation: Preparation,
    workers: int | None,
    watch: Watch,
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make all pieces and shards that are not there yet, and put the corpus in its place.

    It is this call that completes what was made in parts, not whichever part happens to be the last: that could not be
    told for certain across nodes.

    Args:
        workers: processes; by default one per usable core.
        watch: shown how far it is.
        force: replace what is there, even while it is in use.
        report: told whose use was overridden.

    Returns:
        The manifest.

    Raises:
        UsageError: another process works on this corpus, or what is there is in use, or no two documents differ.
        DataError, NanochatError: a source file is damaged or cannot be reached.
    """
    work, folder = preparation.work, preparation.folder
    with lock_folder(work, str(folder)), use_folders(f"the making of {folder}", *preparation.source.folders):
        for lease in refuse_if_used(work, str(work), force=force, fix=OVERRIDE):
            report(f"overriding {lease}")
        receipts = _make_pieces(preparation, range(len(preparation.source.files)), workers, watch)
        in_order = [receipts[index] for index in range(len(receipts))]
        _check_alike(preparation, in_order)
        tasks = _plan_shards(preparation, in_order)
        entries: dict[int, dict[str, Any]] = {}
        with watch("writing shards", len(tasks)) as progress:
            for task, entry in run_tasks(_make_shard, tasks, workers, f"wrote shards of {folder}"):
                entries[task.index] = entry
                progress.advance()
        files = [entries[task.index] for task in tasks]
        corpus = tasks[0].path.parent
        remove_stale_temporaries(corpus)
        counted = ("rows_read", "rows_chosen", "null_texts_skipped")
        names = (file.name for file in preparation.source.files)
        manifest = write_manifest(
            corpus,
            "corpus",
            files,
            schema=in_order[0]["schema"],
            totals=corpus_totals(files),
            empty_texts_skipped=sum(receipt["empty_texts_skipped"] for receipt in in_order),
            invalid_texts_repaired=0,
            details={
                **{key: sum(receipt[key] for receipt in in_order) for key in counted},
                "files": [
                    [name, receipt["rows_read"], receipt["rows_chosen"]] for name, receipt in zip(names, in_order)
                ],
            },
            **preparation.identity,
        )
        for lease in _publish(preparation, corpus, force):
            report(f"overriding {lease}")
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _publish(preparation: Preparation, corpus: Path, force: bool) -> list[Lease]:
    """Give a complete corpus its name; `force` alone replaces what stands there. Returns whose use it overrode."""
    folder = preparation.folder
    overridden: list[Lease] = []
    previous = None
    if force and folder.exists() and any(folder.iterdir()):
        overridden = refuse_if_used(folder, str(folder), force=True)
        previous = temporary_sibling(folder)
        folder.rename(previous)
    elif existing_manifest(folder, preparation.identity) is not None:
        # Another process made the same meanwhile.
        return overridden
    corpus.rename(folder)
    sync_folder(folder.parent)
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)
    return overridden


def _make_pieces(
    preparation: Preparation, indices: Sequence[int], workers: int | None, watch: Watch
) -> dict[int, dict[str, Any]]:
    tasks = [_PieceTask(preparation, index) for index in indices]
    receipts = {}
    with watch("reading", len(tasks)) as progress:
        for task, receipt in run_tasks(_make_piece, tasks, workers, f"read {preparation.source.place}"):
            receipts[task.index] = receipt
            progress.advance(rows=sum(made["rows"] for made in receipts.values()))
    return receipts


def _make_piece(task: _PieceTask) -> dict[str, Any]:
    """Make one piece, or find it made. Returns its receipt."""
    preparation = task.preparation
    path = preparation.piece(task.index)
    finished = _receipt(preparation.receipt(task.index), preparation.key, path)
    if finished is not None:
        return finished
    file = preparation.source.files[task.index]
    piece = _Piece(preparation, f"{preparation.source.place}/{file.name}")
    with open_parquet(preparation.source, file, preparation.columns, preparation.work / "downloads") as parquet:
        schema = pa.schema(column_fields(parquet, preparation.columns))
        choose = preparation.choice.of_file(task.index, file)
        with (
            whole_file(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for table in piece.chosen(read_tables(parquet, preparation.columns), choose, schema):
                writer.write_table(table)
                piece.batches.append(table.num_rows)
    save_array(path.with_suffix(".candidates.npy"), piece.candidates())
    if piece.places:
        save_array(path.with_suffix(".places.npy"), np.concatenate(piece.places))
    receipt = {
        "key": preparation.key,
        "bytes": path.stat().st_size,
        "schema": {field.name: str(field.type) for field in schema},
        "rows": len(piece.digests),
        "batches": piece.batches,
        **piece.counts,
    }
    write_json(preparation.receipt(task.index), receipt)
    return receipt


class _Piece:
    """What is learnt of a source file while its chosen rows pass through."""

    def __init__(self, preparation: Preparation, where: str) -> None:
        self.preparation = preparation
        self.where = where
        self.batches: list[int] = []
        self.places: list[Array] = []
        self.digests: list[int] = []
        self.counts = {"rows_read": 0, "rows_chosen": 0, "null_texts_skipped": 0, "empty_texts_skipped": 0}

    def chosen(
        self,
        tables: Iterator[pa.Table],
        choose: Callable[[int, int], Array],
        schema: pa.Schema,
    ) -> Iterator[pa.Table]:
        """Yield what is kept, a batch at a time."""
        run_bytes = self.preparation.choice.run_bytes
        run: list[pa.Table] = []
        size = 0
        for table in tables:
            first, rows = self.counts["rows_read"], table.num_rows
            self.counts["rows_read"] += rows
            chosen = choose(first, rows)
            if run_bytes is None:
                kept = self._cleaned(table.filter(pa.array(chosen)), schema)
                if kept.num_rows:
                    yield self._digested(kept)
                continue
            run.append(self._cleaned(table.append_column(PLACE_COLUMN, pa.array(chosen)), schema))
            size += run[-1].nbytes
            if size >= run_bytes:
                yield self._in_places(run)
                run, size = [], 0
        if sum(table.num_rows for table in run):
            yield self._in_places(run)

    def candidates(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Digests and rows of the texts that may belong to the validation set, whatever the other pieces hold."""
        digests = np.array(self.digests, np.uint64)
        distinct = np.unique(digests)[: self.preparation.validation_rows]
        rows = np.flatnonzero(digests <= distinct[-1]) if len(distinct) else np.zeros(0, np.int64)
        return np.stack([digests[rows], rows.astype(np.uint64)])

    def _cleaned(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        self.counts["rows_chosen"] += table.num_rows
        texts = table[TEXT_COLUMN]
        if texts.null_count:
            self.counts["null_texts_skipped"] += texts.null_count
            table = table.filter(pc.is_valid(texts))
            texts = table[TEXT_COLUMN]
        try:
            texts.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.where} holds text that is not UTF-8 ({error})", "take the file out") from None
        is_empty = pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))
        if num_empty := pc.sum(is_empty).as_py():
            self.counts["empty_texts_skipped"] += num_empty
            table = table.filter(pc.invert(is_empty))
        fields = [*schema, *(table.schema.field(name) for name in table.schema.names if name not in schema.names)]
        return table.cast(pa.schema(fields)).combine_chunks()

    def _in_places(self, run: list[pa.Table]) -> pa.Table:
        table = pa.concat_tables(run).combine_chunks()
        places = table[PLACE_COLUMN].to_numpy()
        order = np.argsort(places)
        self.places.append(places[order])
        return self._digested(table.drop_columns(PLACE_COLUMN).take(pa.array(order)).combine_chunks())

    def _digested(self, table: pa.Table) -> pa.Table:
        seed = self.preparation.seed
        # The first half of a digest orders texts as well as all of it, and fits into an array.
        self.digests.extend(text_digest(text, seed) >> 64 for text in table[TEXT_COLUMN].cast(pa.binary()).to_pylist())
        return table


def save_array(path: Path, array: Array) -> None:
    """Write a .npy file atomically."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def _receipt(path: Path, key: str, made: Path) -> dict[str, Any] | None:
    """The receipt of an earlier run if what it is about is still there."""
    try:
        receipt: dict[str, Any] = read_json(path)
        if receipt["key"] == key and made.stat().st_size == receipt["bytes"]:
            return receipt
    except (DataError, OSError, KeyError, TypeError):
        pass
    return None


def _check_alike(preparation: Preparation, receipts: list[dict[str, Any]]) -> None:
    for file, receipt in zip(preparation.source.files, receipts):
        if receipt["schema"] != receipts[0]["schema"]:
            raise UsageError(
                f"{file.name} has other types of columns ({receipt['schema']}) than "
                f"{preparation.source.files[0].name} ({receipts[0]['schema']})",
                "choose --columns that are alike in all files",
            )


def _plan_shards(preparation: Preparation, receipts: list[dict[str, Any]]) -> list[_ShardTask]:
    """Choose the validation set and say which rows every shard holds."""
    rows = [receipt["rows"] for receipt in receipts]
    validation = _validation_set(preparation, sum(rows))
    save_array(preparation.work / VALIDATION_NAME, validation)
    remaining = np.array(rows, np.int64) - np.bincount(validation["piece"], minlength=len(rows))
    total = int(remaining.sum())
    if total == 0:
        raise UsageError(
            f"{preparation.folder} would have nothing to train on: its texts hold fewer than two different documents",
            "choose more rows",
        )
    size = preparation.rows_per_shard
    cuts = [(first, min(first + size, total)) for first in range(0, total, size)]
    if preparation.choice.run_bytes is None:
        starts = np.concatenate([[0], np.cumsum(remaining)])
        tasks = [
            _ShardTask(preparation, index, "train", first, last, _ranges(starts, first, last))
            for index, (first, last) in enumerate(cuts)
        ]
    else:
        places = _remaining_places(preparation, validation)
        tasks = [
            _ShardTask(preparation, index, "train", int(places[first]), int(places[last - 1]) + 1)
            for index, (first, last) in enumerate(cuts)
        ]
    return [*tasks, _ShardTask(preparation, len(tasks), "val", 0, len(validation))]


def _validation_set(preparation: Preparation, total: int) -> Array:
    """Piece, row and digest of the rows of the validation set, in its order: by digest, copies by their place."""
    smallest = np.zeros(0, np.uint64)
    paths = [preparation.piece(index).with_suffix(".candidates.npy") for index in range(len(preparation.source.files))]
    for path in paths:
        smallest = np.unique(np.concatenate([smallest, np.load(path)[0]]))[: preparation.validation_rows]
    found = []
    for index, path in enumerate(paths):
        digests, rows = np.load(path)
        chosen = np.isin(digests, smallest)
        members = np.zeros(int(chosen.sum()), VALIDATION_TYPE)
        members["piece"], members["row"], members["digest"] = index, rows[chosen], digests[chosen]
        found.append(members)
    together = np.concatenate(found)
    together = together[np.argsort(together["digest"], kind="stable")]
    # With their copies, texts may be more than their share. Those cut off are whole texts, and never all of them.
    ends = np.append(np.flatnonzero(np.diff(together["digest"])) + 1, len(together))
    fitting = int(np.count_nonzero(ends <= total * LARGEST_VALIDATION_SHARE))
    return together[: ends[max(1, fitting) - 1]]


def _ranges(starts: Array, first: int, last: int) -> tuple[tuple[int, int, int], ...]:
    """Which remaining rows of which pieces are rows `first` to `last` of all."""
    found = []
    for piece in range(int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, last, "left"))):
        low, high = max(first, int(starts[piece])), min(last, int(starts[piece + 1]))
        if low < high:
            found.append((piece, low - int(starts[piece]), high - int(starts[piece])))
    return tuple(found)


def _remaining_places(preparation: Preparation, validation: Array) -> Array:
    """The places of all training rows, in order."""
    found = []
    for index in range(len(preparation.source.files)):
        path = preparation.piece(index).with_suffix(".places.npy")
        if path.exists():
            found.append(np.delete(np.load(path), validation["row"][validation["piece"] == index]))
    return np.sort(np.concatenate(found))


def _make_shard(task: _ShardTask) -> dict[str, Any]:
    """Write one shard, or find it written. Returns its entry in the manifest."""
    preparation = task.preparation
    finished = _receipt(task.receipt_path, preparation.key, task.path)
    if finished is not None:
        return {name: value for name, value in finished.items() if name != "key"}
    validation = np.load(preparation.work / VALIDATION_NAME)
    if task.split == "val":
        tables = _validation_tables(task, validation)
    elif preparation.choice.run_bytes is None:
        tables = _tables_in_order(task, validation)
    else:
        tables = _tables_by_place(task, validation)
    first = next(tables)
    with whole_file(task.path) as temporary:
        entry = write_shard(temporary, chain([first], tables), task.split, first.schema)
    entry["name"] = task.path.name
    write_json(task.receipt_path, {**entry, "key": preparation.key})
    return entry


def _tables_in_order(task: _ShardTask, validation: Array) -> Iterator[pa.Table]:
    """The shard's rows in the order of their source, a batch in memory."""
    for piece, first, last in task.pieces:
        offsets = _batch_offsets(task.preparation, piece)
        rows = np.delete(np.arange(offsets[-1]), validation["row"][validation["piece"] == piece])[first:last]
        with pa.OSFile(str(task.preparation.piece(piece)), "rb") as stream:
            reader = pa.ipc.open_file(stream)
            for batch in range(reader.num_record_batches):
                inside = rows[np.searchsorted(rows, offsets[batch]) : np.searchsorted(rows, offsets[batch + 1])]
                if len(inside):
                    whole = pa.Table.from_batches([reader.get_batch(batch)])
                    yield _rows_of(whole, inside - offsets[batch])


def _tables_by_place(task: _ShardTask, validation: Array) -> Iterator[pa.Table]:
    """The shard's rows in the order of their places, SORTED_ROWS_AT_ONCE in memory.

    Every batch of every piece is sorted by itself, so that what belongs together lies together in each.
    """
    with ExitStack() as opened:
        readers, places, excluded, offsets = {}, {}, {}, {}
        for piece in range(len(task.preparation.source.files)):
            path = task.preparation.piece(piece)
            if not path.with_suffix(".places.npy").exists():
                continue
            readers[piece] = pa.ipc.open_file(opened.enter_context(pa.memory_map(str(path))))
            places[piece] = np.load(path.with_suffix(".places.npy"), mmap_mode="r")
            excluded[piece] = np.sort(validation["row"][validation["piece"] == piece])
            offsets[piece] = _batch_offsets(task.preparation, piece)
        for low in range(task.first, task.last, SORTED_ROWS_AT_ONCE):
            high = min(low + SORTED_ROWS_AT_ONCE, task.last)
            tables, found = [], []
            for piece, reader in readers.items():
                for batch in range(reader.num_record_batches):
                    start = offsets[piece][batch]
                    inside = places[piece][start : offsets[piece][batch + 1]]
                    begin, end = np.searchsorted(inside, [low, high])
                    rows = np.setdiff1d(np.arange(start + begin, start + end), excluded[piece], assume_unique=True)
                    if len(rows):
                        whole = pa.Table.from_batches([reader.get_batch(batch)])
                        tables.append(_rows_of(whole, rows - start))
                        found.append(places[piece][rows])
            if tables:
                order = np.argsort(np.concatenate(found))
                yield pa.concat_tables(tables).take(pa.array(order))


def _validation_tables(task: _ShardTask, validation: Array) -> Iterator[pa.Table]:
    """The validation set, all in memory. Mapped, because it takes a row here and there."""
    tables, where = [], []
    for piece in np.unique(validation["piece"]):
        members = np.flatnonzero(validation["piece"] == piece)
        members = members[np.argsort(validation["row"][members])]
        rows = validation["row"][members]
        offsets = _batch_offsets(task.preparation, int(piece))
        with pa.memory_map(str(task.preparation.piece(int(piece)))) as stream:
            reader = pa.ipc.open_file(stream)
            batches = np.searchsorted(offsets, rows, "right") - 1
            for batch in np.unique(batches):
                whole = pa.Table.from_batches([reader.get_batch(int(batch))])
                tables.append(whole.take(pa.array(rows[batches == batch] - offsets[batch])))
        where.append(members)
    yield pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(where))))


def _batch_offsets(preparation: Preparation, piece: int) -> Array:
    """The first row of every batch of a piece, and the number of all rows."""
    batches = read_json(preparation.receipt(piece))["batches"]
    return np.concatenate([[0], np.cumsum(batches, dtype=np.int64)])


def _rows_of(table: pa.Table, rows: Array) -> pa.Table:
    """Some rows, in order; without a copy where none is left out between them."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return table.slice(int(rows[0]), len(rows))
    return table.take(pa.array(rows))
