"""The preloaded library: only what it is told fails, only on its disk, and only as long as it is told."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.syscalls import Control, compiler

pytestmark = pytest.mark.skipif(not compiler(), reason="no C compiler; the harness says so in its table")

_PROGRAM = """
import json, os, sys, time
def tried(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return 0
for line in sys.stdin:
    on_disk, elsewhere = (os.open(path, os.O_RDWR | os.O_CREAT) for path in sys.argv[1:])
    said = [
        [tried(os.write, file, b"x"), tried(os.pwrite, file, b"x", 0), tried(os.posix_fallocate, file, 0, 9),
         tried(os.fsync, file), tried(os.fdatasync, file)]
        for file in (on_disk, elsewhere)
    ]
    print(json.dumps([*said, time.time()]), flush=True)
"""
_WELL = [0, 0, 0, 0, 0]


class Victim:
    """A process that says which of its system calls fail, and what time it is."""

    def __init__(self, control: Control, disk: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(disk / "file"), str(disk.with_name("elsewhere"))]
        environ = {**os.environ, **control.environ}
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def says(self) -> tuple[list[int], list[int], float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        on_disk, elsewhere, now = json.loads(self._process.stdout.readline())
        return on_disk, elsewhere, now

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def control(tmp_path: Path) -> Control:
    """Return the control of a disk under the test's directory."""
    (tmp_path / "disk").mkdir()
    return Control(tmp_path, tmp_path / "disk")


@pytest.fixture
def victim(control: Control, tmp_path: Path) -> Iterator[Victim]:
    """Yield a process under that control."""
    victim = Victim(control, tmp_path / "disk")
    yield victim
    victim.close()


def test_nothing_fails_unless_it_is_told(victim: Victim) -> None:
    on_disk, elsewhere, now = victim.says()

    assert on_disk == elsewhere == _WELL
    assert abs(now - time.time()) < 60


def test_a_full_disk_takes_no_bytes_and_has_space_again(control: Control, victim: Victim) -> None:
    with control.disk_full():
        on_disk, elsewhere, _ = victim.says()
    assert (on_disk, elsewhere) == ([28, 28, 28, 0, 0], _WELL)
    assert control.failed == 3

    assert victim.says()[0] == _WELL


@pytest.mark.parametrize(("syncs", "expected"), [(True, [0, 0, 0, 5, 5]), (False, [5, 5, 5, 0, 0])])
def test_a_broken_disk_fails(control: Control, victim: Victim, syncs: bool, expected: list[int]) -> None:
    with control.disk_broken(syncs=syncs):
        on_disk, elsewhere, _ = victim.says()

    assert (on_disk, elsewhere) == (expected, _WELL)


@pytest.mark.parametrize("seconds", [3600.25, -3600.25])
def test_the_clock_is_off_and_right_again(control: Control, victim: Victim, seconds: float) -> None:
    with control.clock_off(seconds):
        assert abs(victim.says()[2] - time.time() - seconds) < 60

    assert abs(victim.says()[2] - time.time()) < 60
