"""Download what runs need beside their text, on a machine with network, for all machines without.

Three kinds of things: the data sets behind tasks, the evaluation bundle, and the vocabularies that a tokenizer is
compared with. Each is there whole or not at all, is kept if it is there, and is carried on where a kill stopped it.
"""

import fnmatch
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.config import RunConfig, StageName
from nanochat.corpus.fetch import PART_MARK, Advance, fetch, in_parallel, url_remote
from nanochat.corpus.hub import download_from, open_repository
from nanochat.corpus.preparation import Watch
from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    file_entry,
    lock_folder,
    read_manifest,
    remove_stale_temporaries,
    sha256_file,
    verify_files,
    whole_folder,
    write_manifest,
)
from nanochat.tasks.bundle import BUNDLE_FILE, download_bundle
from nanochat.tasks.bundle import KIND as BUNDLE_KIND
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.inventory import add_to_inventory
from nanochat.tasks.mixture import mixtures_of, parse_mixture
from nanochat.tasks.registry import STAGED, describe_task
from nanochat.tokenizer.evaluate import PEERS, PeerTokenizer, peer_path
from nanochat.workspace import Workspace

KIND = "task_data"
# Names beside those of tasks.
BUNDLE = "core"
ENCODINGS = "encodings"
NAMES = (*sorted(STAGED), BUNDLE, ENCODINGS)


@dataclass(frozen=True)
class Staged:
    """One thing that is staged now.

    Attributes:
        name: of a task, BUNDLE or ENCODINGS.
        folder: where it is.
        note: whether it was downloaded, was there, or took another one's place.
        source: where it came from; empty if it was put there by hand.
        files: name, bytes and sha256 of each.
    """

    name: str
    folder: Path
    note: str
    source: dict[str, Any]
    files: list[dict[str, Any]]


def names_of_run(config: RunConfig, stages: Collection[StageName], task_data: Path) -> list[str]:
    """What a run of the chosen stages will read that can be staged.

    Raises:
        UsageError: its tasks are wrong.
        DataError: a file of conversations of one's own is not there.
    """
    tasks = {entry.task for entries in mixtures_of(config, stages) for entry in parse_mixture(entries)}
    for name in sorted(tasks - STAGED.keys()):
        describe_task(name, task_data)
    more = {BUNDLE: bool({"base", "eval"} & set(stages)), ENCODINGS: "tokenizer" in stages}
    return [name for name in NAMES if name in tasks or more.get(name)]


def stage(
    names: Sequence[str],
    workspace: Workspace,
    watch: Watch,
    *,
    revision: str = "main",
    workers: int = 4,
    peers: Sequence[PeerTokenizer] = PEERS,
) -> Iterator[Staged]:
    """Download what is not there yet, and record all of it in the inventory.

    What fails does not keep the rest from coming.

    Args:
        names: of NAMES.
        watch: shows bytes.
        revision: branch, tag or commit of the data sets' repositories. One that is there at another commit is kept
            unless this names one.
        workers: files at once.
        peers: the vocabularies.

    Raises:
        UsageError: a name is not one, or files of one's own would be replaced.
        NanochatError: a server cannot be reached or refuses; with several failures it names all of them.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"{name!r} is not a task that is staged", f"choose of: {', '.join(NAMES)}")
    failures: dict[str, NanochatError] = {}
    with lock_folder(workspace.task_data, "the task data"):
        remove_stale_temporaries(workspace.task_data)
        for name in names:
            try:
                if name == BUNDLE:
                    staged = _stage_bundle(workspace, watch)
                elif name == ENCODINGS:
                    staged = _stage_encodings(workspace.encodings, peers, watch)
                else:
                    staged = _stage_task(name, workspace.task_data, revision, workers, watch)
            except NanochatError as error:
                failures[name] = error
                continue
            command = f"nanochat stage {name}"
            add_to_inventory(workspace.inventory, name, command, staged.folder, staged.source, staged.files)
            yield staged
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        raise NanochatError(
            "; ".join(error.what for error in failures.values()),
            "; ".join(dict.fromkeys(error.fix for error in failures.values() if error.fix)),
        )


def _stage_task(name: str, task_data: Path, revision: str, workers: int, watch: Watch) -> Staged:
    dataset = STAGED[name][1]
    folder = dataset.folder(task_data)
    there = _what_is_there(dataset, task_data)
    if there is None and folder.exists() and not (folder / MANIFEST_NAME).exists():
        raise UsageError(
            f"{folder} was put there by hand and lacks files of {name}", "move it away and run the same command"
        )
    if there is not None and revision in ("main", there.source.get("revision"), there.source.get("requested")):
        return replace(there, name=name)
    manifest = _download(dataset.repository, folder, revision, workers, watch)
    note = "downloaded"
    if there is not None and there.source.get("revision") != manifest["source"]["revision"]:
        note = f"replaces what was there, of commit {there.source.get('revision', 'unknown')}"
    return Staged(name, folder, note, manifest["source"], manifest["files"])


def _what_is_there(dataset: HubDataset, task_data: Path) -> Staged | None:
    """The staged copy of a data set if it is whole."""
    folder = dataset.folder(task_data)
    try:
        described = dataset.describe_files(task_data)
        if (folder / MANIFEST_NAME).is_file():
            return _from_manifest(folder, KIND)
    except DataError:
        return None
    return Staged("", folder, "was there", {}, [file_entry(folder / name, name=name) for name, *_ in described])


def _from_manifest(folder: Path, kind: str) -> Staged:
    """What a manifest lists, all of it there. Raises DataError if it is not."""
    manifest = read_manifest(folder, kind, "")
    verify_files(folder, manifest["files"], "", checksums=False)
    return Staged("", folder, "was there", manifest["source"], manifest["files"])


def _download(name: str, folder: Path, revision: str, workers: int, watch: Watch) -> dict[str, Any]:
    repository = open_repository(name, revision)
    wanted = _wanted_files(name, list(repository.files))
    # Files wait here until all have come, so that the next process need not fetch any again.
    coming = folder.with_name(f"{PART_MARK}{repository.commit}-{folder.name}")

    def bring(file: str, advance: Advance) -> Path:
        return download_from(repository, file, coming, advance)

    with watch(f"{name} (bytes)", sum(repository.files[file].size for file in wanted)) as shown:
        for _ in in_parallel(bring, wanted, workers, shown.advance):
            pass
    with whole_folder(folder) as temporary:
        for file in wanted:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            (coming / file).rename(temporary / file)
        files = [file_entry(temporary / file, name=file) for file in wanted]
        source = {"repository": name, "revision": repository.commit, "requested": revision}
        manifest = write_manifest(temporary, KIND, files, source=source)
    for older in folder.parent.glob(f"{PART_MARK}*-{folder.name}"):
        shutil.rmtree(older, ignore_errors=True)
    return manifest


def _wanted_files(repository: str, files: Sequence[str]) -> list[str]:
    """What the tasks read of a repository, and its card. All of its tasks: they share the folder.

    Raises:
        DataError: the repository has no files for one of them.
    """
    wanted = {file for file in files if file == "README.md"}
    for _, dataset, _ in STAGED.values():
        if dataset.repository != repository:
            continue
        for patterns in dataset.patterns.values():
            found = next((match for pattern in patterns if (match := fnmatch.filter(files, pattern))), None)
            if found is None:
                raise DataError(f"{repository} has no files {patterns[0]}", "choose another --revision")
            wanted.update(found)
    return sorted(wanted)


def _stage_bundle(workspace: Workspace, watch: Watch) -> Staged:
    folder = workspace.eval_bundle
    if (folder / MANIFEST_NAME).is_file():
        try:
            return replace(_from_manifest(folder, BUNDLE_KIND), name=BUNDLE)
        except DataError:
            pass
    elif (folder / BUNDLE_FILE).is_file():
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return Staged(BUNDLE, folder, "was there", {}, [file_entry(folder / name, name=name) for name in names])
    manifest = download_bundle(folder, workspace.downloads, watch)
    return Staged(BUNDLE, folder, "downloaded", manifest["source"], manifest["files"])


def _stage_encodings(folder: Path, peers: Sequence[PeerTokenizer], watch: Watch) -> Staged:
    mirror = os.environ.get("NANOCHAT_ENCODINGS_URL", "").rstrip("/")
    note = "was there"
    for peer in peers:
        path = peer_path(peer, folder)
        if path.is_file() and sha256_file(path) == peer.sha256:
            continue
        url = f"{mirror}/{peer.url.rpartition('/')[2]}" if mirror else peer.url
        remote = url_remote(url, peer.name, peer.sha256)
        with watch(f"{peer.name} (bytes)", remote.size) as shown:
            fetch(remote, path, shown.advance)
        note = "downloaded"
    paths = [peer_path(peer, folder) for peer in peers]
    source = {"url": mirror or peers[0].url.rpartition("/")[0]}
    return Staged(ENCODINGS, folder, note, source, [file_entry(path) for path in paths])
