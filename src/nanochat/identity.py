"""What code this is, and where: version, commit, image, cores. No torch, so that `nanochat --version` is quick."""

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from nanochat.errors import DataError

DISTRIBUTION = "nanochat-hpc"

# The image writes it while it is built; elsewhere it does not exist.
IMAGE_MANIFEST = Path("/opt/nanochat/manifest.json")

# nvidia-smi waits for the driver, and git for the file system; either may be sick.
PROBE_SECONDS = 20


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, which Slurm and containers narrow, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def output_of(*command: str) -> str | None:
    """What a command prints, or None if it is missing, fails, or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_image(manifest: Path = IMAGE_MANIFEST) -> dict[str, Any]:
    """The manifest of the image this process runs in, or nothing outside of one.

    Its keys: variant, revision (the commit), source and lock (digests), python and debian (packages with versions),
    fingerprint (the digest of the rest).

    Raises:
        DataError: it is there, but is not a manifest.
    """
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest} cannot be read ({error})", "build or copy the image again") from error
    if not isinstance(content, dict) or not {"variant", "revision", "fingerprint"} <= content.keys():
        raise DataError(f"{manifest} is not the manifest of an image", "build or copy the image again")
    return content


def describe_commit(manifest: Path = IMAGE_MANIFEST) -> dict[str, Any]:
    """The commit this code is, and whether it was changed since; empty if nothing tells.

    In this order: NANOCHAT_GIT_COMMIT, where a suffix `-dirty` says changed; git, in a checkout; the image, for the
    code that it brings; pip, which notes the commit of what it installed from a repository.
    """
    told = os.environ.get("NANOCHAT_GIT_COMMIT") or _commit_of_checkout()
    if not told and Path(__file__).is_relative_to(manifest.parent):
        told = str(read_image(manifest).get("revision", ""))
    told = told or _commit_of_installation()
    return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")} if told else {}


def describe_image(manifest: Path = IMAGE_MANIFEST) -> dict[str, str]:
    """What identifies the image, for a record that is kept: not its list of packages."""
    image = read_image(manifest)
    return {name: str(image[name]) for name in ("variant", "revision", "fingerprint") if name in image}


def version_line(manifest: Path = IMAGE_MANIFEST) -> str:
    """One line such as `nanochat 0.1.0 (commit abc1234-dirty, torch 2.13.0+cpu, image cpu fingerprint 0123…)`."""
    commit, torch, image = describe_commit(manifest), installed_version("torch"), describe_image(manifest)
    parts = []
    if commit:
        parts.append(f"commit {commit['commit'][:7]}{'-dirty' if commit['dirty'] else ''}")
    parts.append(f"torch {torch}" if torch else "no torch")
    if image:
        parts.append(f"image {image['variant']} fingerprint {image['fingerprint'][:16]}")
    return f"nanochat {installed_version(DISTRIBUTION) or 'not installed'} ({', '.join(parts)})"


def _commit_of_checkout() -> str:
    here = Path(__file__)
    in_folder = ("git", "-C", str(here.parent))
    # A virtual environment inside somebody else's repository must not report that repository's commit.
    if output_of(*in_folder, "ls-files", "--error-unmatch", here.name) is None:
        return ""
    commit = output_of(*in_folder, "rev-parse", "HEAD")
    changes = output_of(*in_folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}{'' if changes == '' else '-dirty'}" if commit else ""


def _commit_of_installation() -> str:
    """What pip wrote down (direct_url.json, PEP 610) when it installed from a repository."""
    try:
        written = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(json.loads(written or "{}").get("vcs_info", {}).get("commit_id", ""))
