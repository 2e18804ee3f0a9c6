"""The relay as a process of its own: started with given settings, ended or frozen by signal, looked at from outside."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

TOKEN = "a-token-for-tests-0123456789abcdef"


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 30, pause: float = 0.01) -> None:
    """Returns when *condition* holds; fails, naming *what* was waited for, if it does not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(pause)


class RelayProcess:
    """
    `relay serve`, which may be started, killed and started again with the same settings, ports and spool.

    Everything it needs is in *directory*. *settings* are RELAY_* variables, over those that make it work at all.
    """

    def __init__(self, directory: Path, bootstrap_servers: str, settings: Mapping[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._log = directory / "relay.log"
        self._log.touch()
        self._read_from = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved = [_reserve(), _reserve()]
        self.port, self.admin_port = (reserved.getsockname()[1] for reserved in self._reserved)
        self.settings = {
            "RELAY_TOKEN": TOKEN,
            "RELAY_HTTP_PORT": str(self.port),
            "RELAY_ADMIN_HOST": "127.0.0.1",
            "RELAY_ADMIN_PORT": str(self.admin_port),
            "RELAY_SPOOL_PATH": str(directory / "spool" / "relay.db"),
            "RELAY_KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers,
            **settings,
        }

    @property
    def url(self) -> str:
        """Where deliveries go."""
        return f"http://127.0.0.1:{self.port}/rocketchat"

    @property
    def spool_path(self) -> Path:
        """The spool file."""
        return Path(self.settings["RELAY_SPOOL_PATH"])

    # --- Its life. ---

    def start(self, *, ready: bool = True, connected: bool = False, under: Sequence[str] = ()) -> "RelayProcess":
        """
        Starts it; returns when it accepts deliveries if *ready*, when Kafka takes them if *connected*. *under* is the
        beginning of the command line.
        """
        assert self.ended, "it runs"
        self._read_from = self._log.stat().st_size
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*under, sys.executable, "-m", "relay", "serve"],
                env={**environ, **self.settings},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if ready or connected:
            self.wait_for("serving")
        if connected:
            self.wait_for("kafka_connected", seconds=60)
        return self

    @property
    def ended(self) -> bool:
        """Whether it does not run."""
        return self._process is None or self._process.poll() is not None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Returns its exit code once it has ended by itself."""
        assert self._process
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the relay did not end within {seconds:g} s:\n{self.log_tail()}") from None

    def stop(self, seconds: float = 30) -> int:
        """Ends it with SIGTERM; returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def kill(self) -> None:
        """Ends it with SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Stops it in its tracks (SIGSTOP): its connections stay open and nothing answers."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it run on (SIGCONT)."""
        self.signal(signal.SIGCONT)

    def limit_file_size(self, size: int) -> None:
        """Lets none of its files grow beyond *size* bytes, as a full disk would; -1 ends that."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))

    def close(self) -> None:
        """Ends it for good and gives its ports back."""
        self.kill()
        while self._reserved:
            self._reserved.pop().close()

    # --- What it says. ---

    def log_text(self) -> str:
        """All that it wrote since it was last started."""
        with self._log.open("rb") as log:
            log.seek(self._read_from)
            return log.read().decode(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        """The end of all that it ever wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def log(self, action: str) -> list[dict[str, Any]]:
        """The log lines with that action since it was last started."""
        mark = f'"action":"{action}"'
        lines = [line for line in self.log_text().splitlines(keepends=True) if mark in line and line.endswith("\n")]
        return [json.loads(line) for line in lines]

    def wait_for(self, action: str, *, seconds: float = 30) -> dict[str, Any]:
        """The first log line with that action since it was last started, waiting for it if need be."""
        found: list[dict[str, Any]] = []

        def logged() -> bool:
            found.extend(self.log(action))
            assert found or not self.ended, f"the relay ended:\n{self.log_tail()}"
            return bool(found)

        wait_until(logged, f"log line {action}", seconds=seconds)
        return found[0]

    def admin(self, path: str) -> tuple[int, str]:
        """Status and body of an answer of the admin port."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def clock(self) -> float:
        """What time it is by the relay's clock, to the second: seconds since the epoch."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=10)
        try:
            connection.request("GET", "/healthz")
            return parsedate_to_datetime(connection.getresponse().headers["Date"]).timestamp()
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        """The body of `/status`."""
        code, body = self.admin("/status")
        assert code == 200, body
        status: dict[str, Any] = json.loads(body)
        return status

    def metrics(self) -> dict[str, float]:
        """Every series of `/metrics`, by its name with its labels."""
        code, body = self.admin("/metrics")
        assert code == 200, body
        series = (line.rpartition(" ") for line in body.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in series}

    def is_drained(self) -> bool:
        """Whether all it accepted is on Kafka, as it says itself."""
        status = self.status()
        return status["kafka"]["connected"] and not status["spool"]["events"]

    def wait_until_drained(self, *, seconds: float = 60) -> None:
        """Returns when all it accepted is on Kafka, as it says itself."""
        wait_until(self.is_drained, f"drained: {self.log_tail(3)}", seconds=seconds, pause=0.03)


def run_relay(directory: Path, *arguments: str, settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of the relay's to its end, with these settings alone."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        env={**environ, **settings},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _reserve() -> socket.socket:
    # Bound and never listening: nobody else is given the port, and who asks for it by number, as asyncio does, gets it.
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reserved
