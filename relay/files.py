"""The files beside the spool's own: who owns it, and space that is kept for a full disk."""

import fcntl
import os
from pathlib import Path

from relay.errors import SpoolInUse

#: Disk space that is given up on a full disk, so that what is on Kafka can be taken out of the spool.
RESERVE_BYTES = 4 << 20
_PRIVATE = 0o600


class Reserve:
    """Disk space in a file of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = path.exists() and path.stat().st_blocks * 512 >= RESERVE_BYTES

    def keep(self) -> None:
        """
        Takes the space, if it is there to be had.

        Raises: OSError for anything but a lack of space.
        """
        if self._kept:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            self._kept = True
        except OSError:  # Another time.
            os.truncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def release(self) -> bool:
        """Gives the space up; False if there is none."""
        if not self._kept:
            return False
        os.truncate(self._path, 0)
        self._kept = False
        return True


def own(path: Path) -> int:
    """
    Takes the spool at *path* for this process, until the returned descriptor is closed or the process ends.

    Raises: SpoolInUse, OSError.
    """
    # A lock of our own beside the file: SQLite's would shut out the commands that look into a running spool.
    lock = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(lock, 20).decode(errors="replace").strip()
        os.close(lock)
        raise SpoolInUse(
            f"The spool {path} belongs to another relay (process {owner or 'unknown'}): "
            "stop that one, or set another RELAY_SPOOL_PATH."
        ) from None
    try:
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except OSError:
        os.close(lock)
        raise
    return lock


def owner(path: Path) -> int | None:
    """
    The process that has the spool at *path*, as far as it can be told without touching its lock; none if it has ended.
    """
    try:
        process = int(_lock_of(path).read_text())
        os.kill(process, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    except PermissionError:  # Somebody else's, so it is there.
        pass
    return process


def _lock_of(path: Path) -> Path:
    # Of the file itself, by whatever name it is reached.
    path = path.resolve()
    return path.with_name(path.name + ".lock")


def make_private(path: Path) -> None:
    """Makes the file *path* unless it is there: SQLite would let everybody read what customers write."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE))


def make_directory(directory: Path) -> None:
    """Makes *directory* and those above it, unless they are there; their names are durable then."""
    new = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for each in new:
        sync_directory(each.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in *directory* durable: a file is only as durable as its name."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
