"""W&B's transaction log, `run-<id>.wandb`: read whatever a dead process left of one, and write a clean one.

wandb 0.31 ships no Python reader any more, so the framing is done here: a header of 7 bytes, then protobuf records in
LevelDB's log format (blocks of 32 KiB, of a record pieces first, middle and last), but with the CRC-32 of zip.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat.files import whole_file

# Magic, a second one, and the version of the format.
HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
PIECE = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def record_types() -> Any:
    """The classes that records consist of, as wandb's protocol generates them: without types, hence `Any`."""
    from wandb.proto import wandb_internal_pb2

    return wandb_internal_pb2


def read_log(path: Path) -> list[Any]:
    """The records of a log, `wandb.proto.wandb_internal_pb2.Record`, up to the first that is torn or damaged.

    A file that is no log, or only the header of one, as a process leaves that was killed early, has none.
    """
    from google.protobuf.message import DecodeError

    parse, records = record_types().Record.FromString, []
    try:
        for payload in _payloads(path.read_bytes()):
            records.append(parse(payload))  # noqa: PERF401 (an error keeps what came before)
    except DecodeError:
        pass
    return records


def write_log(path: Path, records: Iterable[Any]) -> None:
    """Write a log of these records, numbered anew, atomically."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(HEADER)
        for number, record in enumerate(records, start=1):
            record.num = number
            payload, kind = record.SerializeToString(), FIRST
            while True:
                room = BLOCK - stream.tell() % BLOCK
                if room < PIECE.size:
                    stream.write(bytes(room))
                    room = BLOCK
                piece, payload = payload[: room - PIECE.size], payload[room - PIECE.size :]
                if not payload:
                    kind = FULL if kind == FIRST else LAST
                stream.write(PIECE.pack(_checksum(kind, piece), len(piece), kind) + piece)
                if not payload:
                    break
                kind = MIDDLE


def _payloads(data: bytes) -> Iterator[bytes]:
    if not data.startswith(HEADER):
        return
    place, parts = len(HEADER), b""
    while True:
        room = BLOCK - place % BLOCK
        if room < PIECE.size:
            place += room
        if place + PIECE.size > len(data):
            return
        checksum, length, kind = PIECE.unpack_from(data, place)
        place += PIECE.size
        piece = data[place : place + length]
        if len(piece) < length or _checksum(kind, piece) != checksum:
            return
        place += length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts


def _checksum(kind: int, piece: bytes) -> int:
    return zlib.crc32(bytes([kind]) + piece)
