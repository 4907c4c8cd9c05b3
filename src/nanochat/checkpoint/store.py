"""Checkpoints that are whole, verified, and loadable on any number of devices.

A checkpoint is a folder `step_NNNNNN/`:

    model.safetensors       weights, float32
    optimizer.safetensors   optimizer state by parameter name, unsharded
    state.json              step, loader lanes, RNG, totals so far: everything else a run needs to carry on
    config.json             the whole resolved configuration, model shape, versions, fingerprints
    manifest.json           size and SHA-256 of each, written last

It is written beside its final place, synced, and renamed: a kill or a full disk at any moment leaves the older
checkpoints untouched and at most a `.tmp-` folder, which the next save removes. Loading checks every byte. A damaged
newest checkpoint is set aside under `damaged-…` with a warning and the one before is used. Nothing is unpickled.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.checkpoint.folders import KIND, checkpoint_folder, list_steps, tensors_fingerprint
from nanochat.errors import DataError, NanochatError
from nanochat.files import (
    file_entry,
    read_json,
    read_manifest,
    remove_stale_temporaries,
    sync_file,
    sync_folder,
    temporary_sibling,
    verify_files,
    write_json,
    write_manifest,
)

# Head-room over the tensors themselves for headers, state and the file system's own needs.
SPACE_MARGIN = 1.05


class CheckpointNotSavedError(NanochatError):
    """A checkpoint could not be written; those before it are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified.

    Attributes:
        fingerprint: of everything in it, the seconds that training took included.
        tensors_fingerprint: of weights and optimizer state alone: the same run gives the same one on any day.
    """

    folder: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]
    fingerprint: str
    tensors_fingerprint: str


def save_checkpoint(
    parent: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int,
) -> str:
    """Write the checkpoint of a step, then remove all but the newest `keep`.

    Called by rank 0 only. Older ones are removed only after the new one is in place and on disk.

    Returns:
        The checkpoint's fingerprint.

    Raises:
        CheckpointNotSavedError: the disk is full, over quota or read-only; older checkpoints are untouched.
    """
    final = checkpoint_folder(parent, step)
    temporary = temporary_sibling(final)
    needed = sum(tensor.nbytes for tensors in (model, optimizer) for tensor in tensors.values())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(parent)
        free = shutil.disk_usage(parent).free
        if free < needed * SPACE_MARGIN:
            raise OSError(f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")
        temporary.mkdir()
        save_file(_owning(model), temporary / "model.safetensors")
        save_file(_owning(optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"step": step, **state})
        write_json(temporary / "config.json", config)
        names = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"]
        for name in names[:2]:
            # safetensors makes its files private; whoever may read the rest of a checkpoint may read these.
            (temporary / name).chmod((temporary / "config.json").stat().st_mode)
            sync_file(temporary / name)
        manifest = write_manifest(temporary, KIND, [file_entry(temporary / name) for name in names], step=step)
        if final.exists():
            # The same step again, after a resume from an older one: the content is the same, the newer files count.
            _remove(final)
        temporary.rename(final)
        sync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointNotSavedError(
            f"checkpoint of step {step} could not be written to {parent}: {error}",
            "free space or quota there, or set NANOCHAT_BASE_DIR to a larger file system; older checkpoints are intact",
        ) from error
    for old in list_steps(parent)[:-keep]:
        _remove(checkpoint_folder(parent, old))
    return str(manifest["fingerprint"])


def load_checkpoint(
    parent: Path, step: int, fix: str, checksums: bool = True, with_optimizer: bool = True
) -> Checkpoint:
    """Read the checkpoint of one step, checking every byte.

    Args:
        fix: the command that an error names.
        checksums: off where another rank has just checked the same files.
        with_optimizer: off where the model is only used: the optimizer's state is twice its size.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    folder = checkpoint_folder(parent, step)
    manifest = read_manifest(folder, KIND, fix)
    verify_files(folder, manifest["files"], fix, checksums)
    state = read_json(folder / "state.json", fix)
    return Checkpoint(
        folder=folder,
        step=state["step"],
        model=load_file(folder / "model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors") if with_optimizer else {},
        state=state,
        config=read_json(folder / "config.json", fix),
        fingerprint=manifest["fingerprint"],
        tensors_fingerprint=tensors_fingerprint(manifest),
    )


def load_newest(parent: Path, fix: str, with_optimizer: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest good checkpoint, setting damaged ones aside.

    Called by rank 0 only, since it renames what is damaged.

    Returns:
        The checkpoint, None if there is none, and one warning per damaged checkpoint passed over.

    Raises:
        DataError: there are checkpoints and every one of them is damaged: starting over is then the user's choice.
    """
    warnings: list[str] = []
    steps = list_steps(parent)
    for step in reversed(steps):
        try:
            return load_checkpoint(parent, step, fix, with_optimizer=with_optimizer), warnings
        except DataError as error:
            folder = checkpoint_folder(parent, step)
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            warnings.append(f"{error.what}; set aside as {aside.name}")
    if steps:
        raise DataError(
            f"every checkpoint in {parent} is damaged: {'; '.join(warnings)}",
            f"to train from the start, run the same command again; to look first, see {parent}/damaged-*",
        )
    return None, warnings


def _remove(folder: Path) -> None:
    """Delete a checkpoint in a way that never leaves half of one under a valid name."""
    trash = temporary_sibling(folder)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _owning(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors stores tensors that own their memory, so views of parameter banks are copied out."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in on_cpu.items()
    }
