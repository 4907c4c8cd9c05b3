"""Where checkpoints are and what their manifests say: what can be known of them without reading a tensor."""

import re
from pathlib import Path
from typing import Any

from nanochat.files import fingerprint

FOLDER_PATTERN = re.compile(r"step_(\d{6,})")
KIND = "checkpoint"
SUFFIX = ".safetensors"


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return parent / f"step_{step:06d}"


def tensors_fingerprint(manifest: dict[str, Any]) -> str:
    """What a checkpoint's manifest says of its weights and optimizer state."""
    return fingerprint(
        {entry["name"]: entry["sha256"] for entry in manifest["files"] if entry["name"].endswith(SUFFIX)}
    )


def list_steps(parent: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    if not parent.is_dir():
        return []
    matches = (FOLDER_PATTERN.fullmatch(folder.name) for folder in parent.iterdir() if folder.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)
