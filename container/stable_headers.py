"""Make an image file a function of its contents.

Apptainer writes a random id, the time and the builder's user id into a SIF file's header and into the descriptor of
each object in it (before 1.5, whatever SOURCE_DATE_EPOCH says). All else is decided by the contents. Here the id is
made from the contents, the times are the given one, and the owner is root. A signature covers these fields, so an image
is signed after this.

The layout is that of https://github.com/apptainer/sif: a header of 128 bytes and descriptors of 585, little-endian.
"""

import hashlib
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"SIF_MAGIC\0"
SIGNATURE = 0x4005
DESCRIPTOR_BYTES = 585
# Offsets in the header: magic, id, times (created, modified), counts (free, total) with the place of the descriptors.
MAGIC_AT, ID_AT, TIMES_AT, TABLE_AT = 32, 48, 64, 80
# Kind, whether in use, number, group, link, offset, size, size with padding; then created, modified, owner, group.
DESCRIPTOR = struct.Struct("<i?IIIqqq")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class DataObject:
    """One object in an image file: the definition, the labels or the file system."""

    kind: int
    num_bytes: int
    digest: str


def stabilise(image: Path, epoch: int) -> list[DataObject]:
    """Rewrite the headers of an unsigned image in place, and return what it holds.

    Raises:
        ValueError: the file is not an image, or is signed.
    """
    objects = []
    with image.open("r+b") as file:
        header = bytearray(file.read(128))
        if header[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
            raise ValueError(f"{image} is no image file")
        _, total, table_at = struct.unpack_from("<3q", header, TABLE_AT)
        file.seek(table_at)
        table = bytearray(file.read(DESCRIPTOR_BYTES * total))
        for at in range(0, len(table), DESCRIPTOR_BYTES):
            kind, used, _, _, _, offset, num_bytes, _ = DESCRIPTOR.unpack_from(table, at)
            if not used:
                continue
            if kind == SIGNATURE:
                raise ValueError(f"{image} is signed; it has stable headers already, or is signed too early")
            digest = hashlib.sha256()
            file.seek(offset)
            for done in range(0, num_bytes, BLOCK_BYTES):
                digest.update(file.read(min(BLOCK_BYTES, num_bytes - done)))
            objects.append(DataObject(kind, num_bytes, digest.hexdigest()))
            struct.pack_into("<4q", table, at + DESCRIPTOR.size, epoch, epoch, 0, 0)
        contents = hashlib.sha256("".join(f"{found.kind} {found.digest}\n" for found in objects).encode())
        header[ID_AT : ID_AT + 16] = uuid.UUID(bytes=contents.digest()[:16], version=5).bytes
        struct.pack_into("<2q", header, TIMES_AT, epoch, epoch)
        file.seek(0)
        file.write(header)
        file.seek(table_at)
        file.write(table)
    return objects
