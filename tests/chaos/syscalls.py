"""The relay's disk and clock, made to fail from outside through a preloaded library (syscalls.c)."""

import errno
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relay_process import wait_until

_SOURCE = Path(__file__).with_suffix(".c")
_LAYOUT = struct.Struct("=qiiiii")
_OFFSETS = {"clock_offset": 0, "write_error": 8, "sync_error": 12, "hold_sync": 16, "held": 20, "failed": 24}


def compiler() -> str | None:
    """The C compiler, if the machine has one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Control:
    """What the disk below *disk* and the clock do to every process that is started with `environ`."""

    def __init__(self, directory: Path, disk: Path) -> None:
        """Compiles the library into *directory*; needs a C compiler."""
        command = compiler()
        assert command
        library, path = directory / "syscalls.so", directory / "control"
        arguments = [command, "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
        subprocess.run(arguments, check=True, capture_output=True)
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        #: What a process is started with.
        self.environ = {"LD_PRELOAD": str(library), "CHAOS_CONTROL": str(path), "CHAOS_DISK": f"{disk}{os.sep}"}

    @property
    def failed(self) -> int:
        """How many system calls were made to fail so far."""
        return self._get("failed")

    @contextmanager
    def disk_full(self) -> Iterator[None]:
        """Every write fails: no space left on the device."""
        with self._set(write_error=errno.ENOSPC):
            yield

    @contextmanager
    def disk_broken(self, *, syncs: bool) -> Iterator[None]:
        """Every fsync (*syncs*) or every write fails: input/output error."""
        with self._set(**{"sync_error" if syncs else "write_error": errno.EIO}):
            yield

    @contextmanager
    def clock_off(self, seconds: float) -> Iterator[None]:
        """The wall clock is ahead of the true one by *seconds*, or behind it."""
        struct.pack_into("=q", self._map, 0, round(seconds * 1e9))
        try:
            yield
        finally:
            struct.pack_into("=q", self._map, 0, 0)

    @contextmanager
    def commit_held(self) -> Iterator[None]:
        """The next commit has been written to the WAL and not been fsynced, so that nobody was told of it."""
        self._put("held", 0)
        with self._set(hold_sync=1):
            wait_until(lambda: bool(self._get("held")), "a commit is held at its fsync")
            yield

    @contextmanager
    def _set(self, **values: int) -> Iterator[None]:
        for name, value in values.items():
            self._put(name, value)
        try:
            yield
        finally:
            for name in values:
                self._put(name, 0)

    def _get(self, name: str) -> int:
        (value,) = struct.unpack_from("=i", self._map, _OFFSETS[name])
        return int(value)

    def _put(self, name: str, value: int) -> None:
        struct.pack_into("=i", self._map, _OFFSETS[name], value)
