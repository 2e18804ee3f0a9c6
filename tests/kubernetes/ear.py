"""What the stand-ins for Rocket.Chat tell the test, wherever in the cluster they run."""

import base64
import json
import socketserver
import threading
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

from oracle import Sent
from relay_process import wait_until

Told = dict[str, Any]


class Ear:
    """Listens to any number of stand-ins while the with-block runs."""

    def __init__(self) -> None:
        #: All that was told, in the order in which it was heard.
        self.told: list[Told] = []
        self._server = _Server(("0.0.0.0", 0), _Listener)
        self._server.hear = self.told.append
        self._thread = threading.Thread(target=self._server.serve_forever, name="ear")

    @property
    def port(self) -> int:
        """Where it listens, on all of this machine's addresses."""
        return int(self._server.server_address[1])

    @property
    def sent(self) -> dict[str, list[Sent]]:
        """Every event by its pod; those of one chat in the order in which they were sent."""
        delivered = {(it["pod"], it["event"]) for it in self.all("sent") if it["delivered"]}
        by_pod: dict[str, list[Sent]] = defaultdict(list)
        for it in self.all("sends"):
            by_pod[it["pod"]].append(Sent(base64.b64decode(it["body"]), (it["pod"], it["event"]) in delivered))
        return by_pod

    def all(self, what: str) -> list[Told]:
        """What was told of that kind so far."""
        return [it for it in self.told if it["what"] == what]

    def statuses(self, *, stopping: bool | None = None) -> list[int | None]:
        """The answers to all tries so far, or to those while the stand-in stopped, or before; None: there was none."""
        return [it["status"] for it in self.all("tried") if stopping in (None, it["stopping"])]

    def wait_for_answers(self, count: int, *, seconds: float = 120) -> None:
        """Returns when *count* more tries were answered 200."""
        target = self.statuses().count(200) + count
        wait_until(lambda: self.statuses().count(200) >= target, f"{count} more answers", seconds=seconds, pause=0.2)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    hear: Callable[[Told], None]


class _Listener(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            cast("_Server", self.server).hear(json.loads(line))
