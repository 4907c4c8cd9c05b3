"""Download the data sets behind tasks into `task_data/`, on a machine with network, for all machines without."""

import fnmatch
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat.errors import DataError, NanochatError, UsageError
from nanochat.files import (
    MANIFEST_NAME,
    file_entry,
    lock_folder,
    remove_stale_temporaries,
    whole_folder,
    write_manifest,
)
from nanochat.tasks.hub import HubDataset
from nanochat.tasks.registry import STAGED

KIND = "task_data"


def stage(names: Sequence[str], task_data: Path, revision: str = "main") -> Iterator[tuple[str, Path, bool]]:
    """Download what is not there yet, one repository at a time, each whole or not at all.

    Args:
        names: of tasks; none for all that read files.
        revision: branch, tag or commit of the repositories.

    Yields:
        Name, folder, and whether it was downloaded now.

    Raises:
        UsageError: a task is not there or needs no files, or files of one's own would be replaced.
        NanochatError: the hub cannot be reached or refuses; the message says why.
    """
    for name in names:
        if name not in STAGED:
            raise UsageError(f"{name!r} is not a task that is staged", f"choose of: {', '.join(sorted(STAGED))}")
    with lock_folder(task_data, "the task data"):
        remove_stale_temporaries(task_data)
        for name in names or sorted(STAGED):
            dataset = STAGED[name][1]
            folder, is_missing = dataset.folder(task_data), not _is_there(dataset, task_data)
            if is_missing and folder.exists() and not (folder / MANIFEST_NAME).exists():
                raise UsageError(
                    f"{folder} was put there by hand and lacks files of {name}", "move it away and run the same command"
                )
            if is_missing:
                _download(dataset, folder, revision)
            yield name, folder, is_missing


def _is_there(dataset: HubDataset, task_data: Path) -> bool:
    try:
        dataset.describe_files(task_data)
    except DataError:
        return False
    return True


def _download(dataset: HubDataset, folder: Path, revision: str) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repository = dataset.repository
    failed = f"{repository} at {revision} was not downloaded"
    try:
        info = HfApi().dataset_info(repository, revision=revision)
        wanted = _wanted_files(repository, [file.rfilename for file in info.siblings or ()])
        with whole_folder(folder) as temporary:
            snapshot_download(
                repository, repo_type="dataset", revision=info.sha, allow_patterns=wanted, local_dir=temporary
            )
            # If the hub is lost right at the start, it returns the empty folder as if that were an earlier download.
            if missing := [name for name in wanted if not (temporary / name).is_file()]:
                raise NanochatError(f"{failed}: {missing[0]} did not come", "run the same command again")
            shutil.rmtree(temporary / ".cache", ignore_errors=True)
            files = [file_entry(temporary / name, name=name) for name in wanted]
            write_manifest(temporary, KIND, files, source={"repository": repository, "revision": info.sha})
    except OfflineModeIsEnabled:
        raise NanochatError(f"{failed}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise NanochatError(f"{failed}: the hub answered {status}", _fix(status)) from None
    except Exception as error:
        # What a lost connection raises depends on the version of huggingface_hub. A full disk is told as it is.
        if isinstance(error, NanochatError) or (isinstance(error, OSError) and error.errno):
            raise
        reason = str(error).split("\n")[0]
        raise NanochatError(
            f"{failed}: the hub cannot be reached ({reason})",
            "run it on a machine with network, or name a mirror in HF_ENDPOINT",
        ) from None


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


def _fix(status: int) -> str:
    if status in (401, 403, 404):
        # The hub says 401 of what is not there, lest it tell what is private.
        return "check HF_ENDPOINT and --revision; if access must be granted, ask for it and run: hf auth login"
    if status == 429:
        return "wait some minutes and run the same command again, or log in for a higher limit: hf auth login"
    return "run the same command again later"
