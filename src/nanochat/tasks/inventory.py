"""What was staged for machines without network: one list of every file, which a glance can check."""

from pathlib import Path
from typing import Any

from nanochat.errors import DataError
from nanochat.files import fingerprint, read_json, verify_files, write_json

KIND = "inventory"


def add_to_inventory(
    path: Path, name: str, command: str, folder: Path, source: dict[str, Any], files: list[dict[str, Any]]
) -> None:
    """Record what was staged, in place of what was recorded of the same name.

    Args:
        path: the inventory; what it names is below its folder.
        name: of what was staged.
        command: brings it again.
        folder: where its files are.
        source: where they came from, at which revision.
        files: name, bytes and sha256 of each.
    """
    items = _read(path) if path.exists() else {}
    kept = [{key: file[key] for key in ("name", "bytes", "sha256")} for file in files]
    items[name] = {
        "command": command,
        "folder": folder.relative_to(path.parent).as_posix(),
        "source": source,
        "files": kept,
    }
    write_json(path, {"kind": KIND, "items": items, "fingerprint": fingerprint(items)})


def check_inventory(path: Path, checksums: bool = False) -> list[DataError]:
    """What is missing or not of its size of all that was staged; each says which command brings it again.

    Args:
        path: the inventory. If there is none nothing was staged, and nothing is missing of it.
        checksums: also read every byte.
    """
    if not path.exists():
        return []
    try:
        items = _read(path)
    except DataError as error:
        return [error]
    found = []
    for item in items.values():
        try:
            verify_files(path.parent / item["folder"], item["files"], item["command"], checksums)
        except DataError as error:
            found.append(error)
    return found


def _read(path: Path) -> dict[str, Any]:
    fix = f"delete it and run: nanochat stage; it was {path}"
    inventory = read_json(path, fix)
    if not isinstance(inventory, dict) or fingerprint(inventory.get("items")) != inventory.get("fingerprint"):
        raise DataError(f"{path} is damaged", "delete it and run: nanochat stage")
    items: dict[str, Any] = inventory["items"]
    return items
