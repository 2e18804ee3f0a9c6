"""A program in a terminal of its own, as somebody sees it who sits there."""

import os
import pty
import select
import subprocess
import termios
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self


class Terminal:
    """Runs *command* for the with-block in a terminal of 24 lines, with *environ* as its whole environment."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, columns: int = 80) -> None:
        self._ours, other_end = pty.openpty()
        termios.tcsetwinsize(other_end, (24, columns))
        self.process = subprocess.Popen(command, env=environ, stdin=other_end, stdout=other_end, stderr=other_end)
        os.close(other_end)
        #: What was written since something was last found by `shows`.
        self.written = b""

    def read(self) -> None:
        """Takes what was written meanwhile: a program whose terminal is full does not go on."""
        while select.select([self._ours], [], [], 0)[0]:
            try:
                self.written += os.read(self._ours, 65536)
            except OSError:  # Linux: the other end is closed.
                break

    def shows(self, text: str) -> bool:
        """Whether *text* has been written since it was last asked whether something shows."""
        self.read()
        found = text in self.written.decode(errors="replace")
        if found:
            self.written = b""
        return found

    def ended(self) -> bool:
        """Whether the program has ended; what it wrote is read."""
        self.read()
        return self.process.poll() is not None

    def press(self, keys: str) -> None:
        """Presses *keys*; "\\x03" is Ctrl-C."""
        os.write(self._ours, keys.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
