"""nanochat's evaluation bundle, the problems of CORE: brought and unpacked where there is network."""

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

from nanochat.corpus.fetch import fetch, path_inside, url_remote
from nanochat.corpus.preparation import Watch
from nanochat.errors import DataError, NanochatError
from nanochat.files import file_entry, sha256_file, whole_folder, write_manifest

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_FILE = "core.yaml"
KIND = "eval_bundle"
# What the archive holds everything in.
TOP = "eval_bundle"


def bundle_url() -> str:
    """Where the bundle is: NANOCHAT_EVAL_BUNDLE_URL, or where nanochat has it."""
    return os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL


def download_bundle(folder: Path, downloads: Path, watch: Watch) -> dict[str, Any]:
    """Bring the archive, unpack it as `folder`, whole or not at all, and write its manifest.

    Args:
        downloads: where the archive is until it is unpacked.
        watch: shows bytes.

    Raises:
        DataError: the archive is damaged, or is not one of the bundle.
        NanochatError: it cannot be reached, or there is no room.
    """
    url = bundle_url()
    remote = url_remote(url, "the evaluation bundle")
    archive = downloads / "eval_bundle.zip"
    with watch("evaluation bundle (bytes)", remote.size) as shown:
        fetch(remote, archive, shown.advance)
    try:
        with whole_folder(folder) as temporary:
            _unpack(archive, temporary)
            names = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
            if BUNDLE_FILE not in names:
                raise DataError(f"{url} has no {TOP}/{BUNDLE_FILE}", "check NANOCHAT_EVAL_BUNDLE_URL")
            files = [file_entry(temporary / name, name=name) for name in names]
            return write_manifest(temporary, KIND, files, source={"url": url, "sha256": sha256_file(archive)})
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{url} is damaged ({error})", "run the same command again") from None
    finally:
        # Of a damaged one nothing is worth keeping, and of a good one nothing is needed.
        archive.unlink(missing_ok=True)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack what is in TOP, and nothing that is no plain file or would lead out of `folder`; checks each CRC."""
    with zipfile.ZipFile(archive) as opened:
        members = [member for member in opened.infolist() if member.filename.startswith(f"{TOP}/")]
        needed, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
        if needed > free:
            raise NanochatError(f"{folder.parent} has no room for {needed} bytes of {TOP}", "make room there")
        for member in members:
            name = member.filename.removeprefix(f"{TOP}/")
            if member.is_dir():
                continue
            path = path_inside(folder, name)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"{archive.name} holds a link, {name}", "do not trust where it comes from")
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
