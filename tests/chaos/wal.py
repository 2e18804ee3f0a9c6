"""SQLite's write-ahead log, as far as it takes to tear its end like a power cut does: https://sqlite.org/walformat.html"""

import random
import struct
from pathlib import Path

_HEADER, _FRAME_HEADER = 32, 24


def frames(wal: bytes) -> list[tuple[int, bool]]:
    """Where each valid frame begins, and whether it commits; what an earlier use of the file left is not valid."""
    if len(wal) < _HEADER:
        return []
    magic, _, page_size = struct.unpack_from(">III", wal)
    order = ">" if magic & 1 else "<"
    salts = wal[16:24]
    sums = _checksum(order, wal[:24], (0, 0))
    found = []
    place = _HEADER
    while place + _FRAME_HEADER + page_size <= len(wal):
        header = wal[place : place + _FRAME_HEADER]
        page = wal[place + _FRAME_HEADER : place + _FRAME_HEADER + page_size]
        sums = _checksum(order, page, _checksum(order, header[:8], sums))
        if header[8:16] != salts or struct.unpack_from(">II", header, 16) != sums:
            break
        found.append((place, header[4:8] != b"\0\0\0\0"))
        place += _FRAME_HEADER + page_size
    return found


def tear(path: Path, rng: random.Random) -> str | None:
    """
    Cuts into the last transaction in the log at *path*: that one must not have been fsynced. Says what it did;
    nothing if there was none.

    The file ends within one of its frames, or has its full length and holds noise from there on.
    """
    wal = path.read_bytes()
    valid = frames(wal)
    commits = [index for index, (_, commits) in enumerate(valid[:-1]) if commits]
    last = valid[commits[-1] + 1 if commits else 0 :]
    if not last:
        return None
    begin, end = last[0][0], last[-1][0] + _FRAME_HEADER + _page_size(wal)
    cut = rng.randrange(begin, end)
    if rng.random() < 0.5:
        with path.open("r+b") as file:
            file.truncate(cut)
        how = "cut off"
    else:
        with path.open("r+b") as file:
            file.seek(cut)
            file.write(rng.randbytes(end - cut))
        how = "noise"
    return f"{how} {cut - begin} bytes into the last transaction of {len(last)} frames"


def _page_size(wal: bytes) -> int:
    (size,) = struct.unpack_from(">I", wal, 8)
    return int(size)


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = first + even + second & 0xFFFFFFFF
        second = second + odd + first & 0xFFFFFFFF
    return first, second
