"""What the faults are done to: Kafka behind proxies, a registry, the relay with its disk and clock, the load."""

import http.client
import json
import shutil
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self

from acceptance.bodies import schema_uris
from acceptance.http_client import post
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from oracle import read_on
from relay_process import RelayProcess, wait_until

from relay.dev.java import reserve
from relay.dev.kafka import LocalBroker, LocalKafka
from relay.dev.registry import LocalRegistry

from .ledger import Chat, Layout, Ledger
from .load import GAP, Load
from .proxy import Proxies
from .schedule import Step
from .syscalls import Control, compiler

PARTITIONS = 6
TOPIC, DEAD_LETTERS, WATERMARKS = "chaos.events", "chaos.dead-letters", "chaos.watermarks"
#: Seconds within which the relay must be back after any fault has ended.
PATIENCE = 300.0
_SECONDS = 60.0
#: The age of the oldest event that a relay under load may have when all is well.
_FRESH = 1.5


class Kafka(LocalKafka):
    """A local Kafka whose brokers have a second address, that of a proxy."""

    def __init__(self, brokers: int, proxies: Proxies, data_dir: Path) -> None:
        super().__init__(brokers, data_dir=data_dir, heap_megabytes=384)
        self._proxies = proxies
        self._behind = [reserve(0) for _ in self.brokers]
        proxies.targets[:] = [socket.getsockname()[1] for socket in self._behind]

    @property
    def proxied_servers(self) -> str:
        """The addresses of all brokers' proxies."""
        return ",".join(f"127.0.0.1:{port}" for port in self._proxies.ports)

    def properties_of(self, broker: LocalBroker) -> Mapping[str, str]:
        here, number = "127.0.0.1", broker.node_id
        direct, controller = f"PLAINTEXT://{here}:{broker.port}", f"CONTROLLER://{here}:{broker.controller_port}"
        return {
            "listeners": f"{direct},PROXIED://{here}:{self._proxies.targets[number]},{controller}",
            "advertised.listeners": f"{direct},PROXIED://{here}:{self._proxies.ports[number]}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT",
        }

    def stop(self) -> None:
        super().stop()
        while self._behind:
            self._behind.pop().close()


class World:
    """Everything of one run, in *directory*, while the with-block runs. The load begins when it is asked to."""

    def __init__(self, directory: Path, *, cluster: int, seed: int, rate: float, registry: bool) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self.proxies = Proxies(cluster)
        self.kafka = Kafka(cluster, self.proxies, directory / "kafka")
        self.registry = LocalRegistry() if registry else None
        layout = Layout(TOPIC, DEAD_LETTERS, PARTITIONS, schema_uris(), framed=registry)
        self.ledger = Ledger(layout)
        self.load = Load(self.ledger, rate=rate, seed=seed)
        self.disk = directory / "disk"
        self.disk.mkdir()
        #: None without a C compiler.
        self.control = Control(directory, self.disk) if compiler() else None
        self._relays: list[RelayProcess] = []
        self.relay: RelayProcess
        #: Set once nothing need be waited for any more.
        self.over = threading.Event()
        self._reached: dict[tuple[str, int], int] = {}
        #: Held by whoever reads, or must have nobody read.
        self.reading = threading.RLock()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(self.proxies)
            undo.enter_context(self.kafka)
            if self.registry:
                undo.enter_context(self.registry)
            self.create_topics(TOPIC, DEAD_LETTERS, WATERMARKS)
            undo.callback(self._close_relays)
            self.relay = self.new_relay()
            self.start_relay()
            self.relay.wait_for("kafka_connected", seconds=_SECONDS)
            self.load.send_to(self.relay.port)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- Topics. ---

    def new_admin(self) -> AdminClient:
        """A client for the brokers' own addresses that remembers no broken connection; to be held while it works."""
        return AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers, "log_level": 2})

    def create_topics(self, *names: str) -> None:
        """
        Creates topics with a replica on each broker.

        But the dead letters' one partition is on the first broker alone: it is without a leader while that one is away.
        """
        brokers = [broker.node_id for broker in self.kafka.brokers]
        turns = [brokers[number % len(brokers) :] + brokers[: number % len(brokers)] for number in range(PARTITIONS)]
        replicas = {TOPIC: turns, DEAD_LETTERS: [brokers[:1]]}
        topics = [
            NewTopic(
                name,
                len(replicas.get(name, turns[:1])),
                replica_assignment=replicas.get(name, turns[:1]),
                config={"cleanup.policy": "compact"} if name == WATERMARKS else {},
            )
            for name in names
        ]
        admin = self.new_admin()
        for future in admin.create_topics(topics, operation_timeout=30).values():
            future.result(_SECONDS)

    def leaders(self, topic: str) -> list[int]:
        """The leader of each partition, -1 where there is none."""
        partitions = self.new_admin().list_topics(topic, timeout=_SECONDS).topics[topic].partitions
        return [partitions[number].leader for number in sorted(partitions)]

    def in_sync(self, topic: str) -> int:
        """How many replicas of the topic are in sync, of the partition that has fewest."""
        partitions = self.new_admin().list_topics(topic, timeout=_SECONDS).topics[topic].partitions
        return min(len(partition.isrs) for partition in partitions.values())

    def read(self, *, seconds: float = 5) -> bool:
        """
        Has the ledger judge what has landed since, up to the end as it is now.

        Returns whether it came to the end: not while Kafka is away, or a transaction open for so many *seconds*.
        """
        with self.reading:
            records = read_on(self.kafka.bootstrap_servers, (TOPIC, DEAD_LETTERS), self._reached, seconds=seconds)
            try:
                self.ledger.land(records)
            except (KafkaException, AssertionError):
                return False
            return True

    def read_to_the_end(self) -> None:
        """As `read`, and again until it came to the end."""
        wait_until(self.read, "all records can be read, and no transaction is open", seconds=PATIENCE, pause=0.2)

    def forget_position(self, topic: str) -> None:
        """The topic is another one now: it is read from its beginning."""
        self._reached = {place: offset for place, offset in self._reached.items() if place[0] != topic}

    def judge_schema_ids(self) -> None:
        """Each id that a record named is that of its own type's schema, as the registry has it."""
        if self.registry is None:
            return
        for type_, id_ in self.ledger.schema_ids.items():
            with urllib.request.urlopen(f"{self.registry.url}/schemas/ids/{id_}", timeout=_SECONDS) as answer:
                title = json.loads(json.load(answer)["schema"])["title"]
            if title != type_:
                self.ledger.blame("corrupted", f"{type_} is framed by schema {id_}, which is that of {title}")

    def judge_dead_events(self) -> None:
        """What was announced as dead is in the spool of the relay, which must have ended."""
        with closing(sqlite3.connect(self.relay.spool_path)) as spool:
            self.ledger.keep(body for (body,) in spool.execute("SELECT body FROM dead"))

    # --- The relay. ---

    def new_relay(self, spool: Path | None = None) -> RelayProcess:
        """A relay that does not run yet, on ports of its own; with a *spool* that is there already, if given."""
        name = f"relay-{len(self._relays) + 1}"
        settings = {
            "RELAY_SPOOL_PATH": str(spool or self.disk / name / "relay.db"),
            "RELAY_TOPIC": TOPIC,
            "RELAY_DEAD_LETTER_TOPIC": DEAD_LETTERS,
            "RELAY_WATERMARK_TOPIC": WATERMARKS,
            "RELAY_DRAIN_SECONDS": "3",
        }
        if self.registry:
            settings["RELAY_SCHEMA_REGISTRY_URL"] = self.registry.url
        if self.control:
            settings |= self.control.environ
        self._relays.append(RelayProcess(self.directory / name, self.kafka.proxied_servers, settings))
        return self._relays[-1]

    def start_relay(self) -> None:
        """Starts the relay, and again if it ends, as every supervisor does: its disk may be full or broken just now."""
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                self.relay.start()
                return
            except AssertionError:
                if not self.relay.ended or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _close_relays(self) -> None:
        for relay in self._relays:
            relay.close()

    def copy_spool(self, *, live: bool) -> Path:
        """A copy of the relay's spool in a new place: of a *live* one as SQLite sees it, else file by file."""
        source = self.relay.spool_path
        place = self.disk / f"copy-{len(self._relays) + 1}"
        place.mkdir()
        copy = place / source.name
        if live:
            with closing(sqlite3.connect(source, timeout=30)) as original, closing(sqlite3.connect(copy)) as target:
                original.backup(target)
        else:
            for name in (source.name, f"{source.name}-wal"):
                if (file := source.with_name(name)).exists():
                    shutil.copy(file, place / name)
        return copy

    def recovered(self, since: float) -> bool:
        """Whether events that were sent after *since* (monotonic) are answered, and all are published at once."""
        assert not self.load.failed, "the load has broken down"
        assert not self.over.is_set(), "the run is over"
        if self.load.answered_sent_at < since:
            return False
        try:
            status = self.relay.status()
        except (OSError, http.client.HTTPException, AssertionError):
            return False
        return bool(status["kafka"]["connected"] and status["spool"]["oldest_event_age_seconds"] < _FRESH)

    def wait_until_recovered(self, since: float | None = None, *, seconds: float = PATIENCE) -> None:
        """Returns when `recovered`, by default since now."""
        since = time.monotonic() if since is None else since
        wait_until(lambda: self.recovered(since), "the relay has recovered", seconds=seconds, pause=0.05)

    def deliver(self, relay: RelayProcess, chat: Chat, body: bytes, *, large: bool = False) -> None:
        """Sends one event more, as often as it takes: there may be other faults about."""
        event = self.ledger.send(chat, body, large=large)

        def taken() -> bool:
            try:
                if post(relay.port, body).status == HTTPStatus.OK:
                    return True
            except OSError:
                pass  # Cut off, or nobody there.
            self.ledger.failed(event)
            return False

        wait_until(taken, "the event is taken", seconds=_SECONDS, pause=GAP)
        self.ledger.answered(event)


class NoEffect(Exception):
    """The fault was done, and met nothing: it does not count."""


#: Does one fault to the world, undoes its cause, and returns what there is to note. Raises: NoEffect.
Fault = Callable[[World, Step], str | None]
