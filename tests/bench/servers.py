"""The processes: what is measured, on a core of its own and read from outside, and the load generators."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .load import TOKEN, Load, Outcome

TOPIC = "rocketchat.omnichannel"
_PUBLISHED = "relay_events_published_total{"
#: Seconds for a start, and for a spool to drain.
_PATIENCE = 120.0
_numbers = itertools.count(0, 10_000_000)


class BenchError(Exception):
    """The benchmark could not be run, or what it measured did not work."""


class Cores:
    """Who runs where: what is measured has the first core for itself."""

    def __init__(self) -> None:
        usable = sorted(os.sched_getaffinity(0))
        self.server = {usable[0]}
        self.load = {usable[1 % len(usable)]}
        #: With two cores Kafka shares the load generator's.
        self.kafka = set(usable[2:]) or self.load


class Server:
    """A process with a webhook port; the bare handler as it stands here. Entered, it serves."""

    def __init__(self, cores: Cores, directory: Path) -> None:
        self.port = _free_port()
        self._cores = cores
        self._log = directory / "server.log"
        self._command = [sys.executable, "-m", "tests.bench.bare", str(self.port)]
        self._settings: Mapping[str, str] = {}
        self._process: subprocess.Popen[bytes]
        #: Seconds from the start of the process until it serves.
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        begun = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, env={**environ, **self._settings}, stdout=log, stderr=log)
        os.sched_setaffinity(self._process.pid, self._cores.server)
        while not self.ready():
            if self._process.poll() is not None or time.perf_counter() > begun + _PATIENCE:
                self.__exit__(None, None, None)
                raise BenchError(f"{self._command} does not serve:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.005)
        self.start_seconds = time.perf_counter() - begun
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def _memory(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text())
        assert found
        return int(found[1]) << 10

    def ready(self) -> bool:
        """Whether it serves."""
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def settle(self) -> None:
        """Returns when nothing is left to be done of what was accepted."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the process: user and system, all threads, to the nanosecond."""
        return time.clock_gettime(~self._process.pid << 3 | 2)  # As clock_getcpuclockid(3) has it.

    @property
    def resident_bytes(self) -> int:
        """Resident memory."""
        return self._memory("VmRSS")

    @property
    def peak_resident_bytes(self) -> int:
        """The most resident memory that it ever had."""
        return self._memory("VmHWM")

    @property
    def handles(self) -> int:
        """How many files and connections are open."""
        return sum(1 for _ in Path(f"/proc/{self._process.pid}/fd").iterdir())


class Relay(Server):
    """`relay serve` with default settings, apart from where things are and how much the spool may hold."""

    def __init__(self, cores: Cores, directory: Path, bootstrap_servers: str, topic: str = TOPIC) -> None:
        super().__init__(cores, directory)
        self.spool_path = directory / "spool" / "relay.db"
        self._admin = _free_port()
        self._command = [str(Path(sys.executable).with_name("relay")), "serve"]
        self._settings = {
            "RELAY_TOKEN": TOKEN,
            "RELAY_HTTP_PORT": str(self.port),
            "RELAY_ADMIN_HOST": "127.0.0.1",
            "RELAY_ADMIN_PORT": str(self._admin),
            "RELAY_SPOOL_PATH": str(self.spool_path),
            "RELAY_TOPIC": topic,
            "RELAY_SPOOL_MAX_BYTES": str(20 << 30),
            "RELAY_TOPIC_CREATE": "true",
            "RELAY_KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers,
        }

    def ready(self) -> bool:
        try:
            return bool(self._get("/readyz"))
        except OSError:
            return False

    def settle(self) -> None:
        deadline = time.perf_counter() + _PATIENCE
        while (status := self.status())["spool"]["events"] or not status["kafka"]["connected"]:
            if time.perf_counter() > deadline:
                raise BenchError(f"The spool does not drain: {status}")
            time.sleep(0.02)

    @property
    def spool_bytes(self) -> int:
        """Size of the spool's file and its write-ahead log."""
        log = self.spool_path.with_name(f"{self.spool_path.name}-wal")
        return self.spool_path.stat().st_size + log.stat().st_size

    @property
    def depth(self) -> int:
        """How many events are not yet on Kafka."""
        return int(self.status()["spool"]["events"])

    @property
    def published(self) -> int:
        """How many events this process has brought to Kafka."""
        lines = self._get("/metrics").decode().splitlines()
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(_PUBLISHED))

    def status(self) -> Any:
        """What `/status` says."""
        return json.loads(self._get("/status"))

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}{path}", timeout=5) as answer:
            return bytes(answer.read())


class Sending:
    """A load generator at work: *rate* events a second, 0 for as many as are answered."""

    def __init__(
        self,
        cores: Cores,
        server: Server,
        seconds: float,
        rate: int = 0,
        *,
        keep_alive: bool = False,
        mixed: bool = False,
    ) -> None:
        self._first = next(_numbers)
        load = Load(server.port, seconds, rate, keep_alive, self._first, mixed)
        command = [sys.executable, "-m", "tests.bench.load", json.dumps(load._asdict())]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        os.sched_setaffinity(self._process.pid, cores.load)
        #: Of the events that were accepted, once the outcome is known.
        self.numbers = range(0)

    def stop(self) -> None:
        """Ends it early."""
        self._process.terminate()

    def outcome(self) -> Outcome:
        """
        Waits for what came of it.

        Raises: BenchError if not every event was answered 200.
        """
        answer, _ = self._process.communicate()
        if self._process.returncode:
            raise BenchError("The load generator failed.")
        outcome = Outcome(*json.loads(answer))
        if outcome.errors:
            raise BenchError(f"Not every event was answered 200: {outcome.errors}")
        self.numbers = range(self._first, self._first + outcome.events)
        return outcome


def _free_port() -> int:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return int(reserved.getsockname()[1])
