"""A real Apache Kafka on this machine, from nothing but Python packages: for `relay dev`, the tests and benchmarks."""

import atexit
import contextlib
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from relay.dev.download import Progress
from relay.dev.java import JavaProcess, reserve
from relay.dev.kafka_requests import create_topics, serving_brokers
from relay.dev.kafka_runtime import KafkaUnusableError, Runtime, new_id, prepare

_HOST = "127.0.0.1"
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_PROPERTIES = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": ",".join(["CONTROLLER:PLAINTEXT", *(f"{name}:{name}" for name in _PROTOCOLS)]),
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    # When a dead leader's partitions move, and a killed broker is let in again: by default 9 s after its death.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    # Fewer partitions and threads than for a production load: each costs time at every start.
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "num.network.threads": "2",
    "num.io.threads": "4",
    # Compaction soon, and without its buffer of 128 MB.
    "log.cleaner.dedupe.buffer.size": "4194304",
    "log.cleaner.backoff.ms": "1000",
}


class LocalBroker(JavaProcess):
    """One broker, which is also a controller, as a process of its own."""

    def __init__(self, cluster: "LocalKafka", node_id: int, home: Path) -> None:
        super().__init__(self._prepared_command, home / "broker.log")
        self.node_id = node_id
        self._cluster = cluster
        self._home = home
        self._reserved = [reserve(0), reserve(0)]
        self.port, self.controller_port = (reserved.getsockname()[1] for reserved in self._reserved)

    def start(self, *, wait: bool = True) -> None:
        """
        Start the broker on its port and its data, unless it runs.

        With *wait*, return when it serves; it can do so only while the majority of the brokers runs.

        Raises:
            KafkaUnusableError: it ended, or did not serve within 90 s; with the end of its log.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        super().start()
        if wait:
            self._cluster.wait_until_ready(self)

    def restart(self) -> None:
        """Stop the broker cleanly if it runs, and start it again."""
        self.stop()
        self.start()

    def reserve_ports(self) -> None:
        """Keep the ports from everybody else until they are released, also while the broker is down."""
        if not self._reserved:
            self._reserved = [reserve(self.port), reserve(self.controller_port)]

    def release_ports(self) -> None:
        while self._reserved:
            self._reserved.pop().close()

    def _prepared_command(self) -> list[str]:
        if sys.platform != "linux":  # Elsewhere a bound socket keeps the broker out, too.
            self.release_ports()
        properties = self._home / "server.properties"
        properties.write_text("".join(f"{key}={value}\n" for key, value in self._properties().items()))
        runtime = self._cluster.runtime
        runtime.format(self._home / "data", self._cluster.cluster_id, self.node_id)
        return runtime.command("kafka.Kafka", str(properties), heap_megabytes=self._cluster.heap_megabytes)

    def _properties(self) -> dict[str, str]:
        brokers = self._cluster.brokers
        replicas = min(len(brokers), 3)
        in_sync = max(replicas - 1, 1)
        return {
            **_PROPERTIES,
            "node.id": str(self.node_id),
            "listeners": f"PLAINTEXT://{_HOST}:{self.port},CONTROLLER://{_HOST}:{self.controller_port}",
            "controller.quorum.voters": ",".join(f"{it.node_id}@{_HOST}:{it.controller_port}" for it in brokers),
            "log.dirs": str(self._home / "data"),
            "default.replication.factor": str(replicas),
            "min.insync.replicas": str(in_sync),
            "offsets.topic.replication.factor": str(replicas),
            "transaction.state.log.replication.factor": str(replicas),
            "transaction.state.log.min.isr": str(in_sync),
            **self._cluster.properties_of(self),
        }


class LocalKafka:
    """
    A cluster of one or three brokers on the loopback interface, as a context manager or with start() and stop().

    *data_dir* keeps the data; without it they are thrown away by stop(). *properties* go to every broker, over the
    defaults here, and are read at each start of one. The ports are chosen at once and stay the same; stop() gives them
    back. No broker outlives this process. Every method may be called from any thread.
    """

    def __init__(
        self,
        brokers: int = 1,
        *,
        data_dir: Path | None = None,
        properties: Mapping[str, str] | None = None,
        heap_megabytes: int = 512,
        on_progress: Progress | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.properties = dict(properties or {})
        self.heap_megabytes = heap_megabytes
        self._keep = data_dir is not None
        self._data_dir = data_dir or Path(tempfile.gettempdir(), f"relay-kafka-{uuid.uuid4().hex}")
        self._on_progress = on_progress
        self._runtime = runtime
        self.brokers = [LocalBroker(self, node_id, self._data_dir / f"broker-{node_id}") for node_id in range(brokers)]

    def properties_of(self, broker: LocalBroker) -> Mapping[str, str]:  # noqa: ARG002 (for what derives from this)
        """Return what *broker* is to have over the defaults."""
        return self.properties

    @property
    def bootstrap_servers(self) -> str:
        """The addresses of all brokers, comma-separated."""
        return ",".join(f"{_HOST}:{broker.port}" for broker in self.brokers)

    @property
    def runtime(self) -> Runtime:
        """What the brokers are started from; downloaded when first asked for."""
        self._runtime = self._runtime or prepare_runtime(self._on_progress)
        return self._runtime

    @property
    def cluster_id(self) -> str:
        """The cluster's id, which its data carry."""
        file = self._data_dir / "cluster.id"
        if not file.exists():
            file.write_text(new_id())
        return file.read_text()

    def start(self) -> None:
        """
        Start every broker that does not run, and return when all of them serve.

        The very first start on a machine downloads Kafka: *on_progress* is told.

        Raises:
            JavaNotFoundError, DownloadError: Kafka cannot be had.
            KafkaUnusableError: a broker ended, or they did not serve within 90 s; with the end of its log.
        """
        _ = self.runtime
        self._data_dir.mkdir(parents=True, exist_ok=True)
        atexit.register(self.stop)
        try:
            for broker in self.brokers:
                broker.reserve_ports()
                broker.start(wait=False)
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every broker, and throw the data away unless *data_dir* was given."""
        atexit.unregister(self.stop)
        for broker in self.brokers:
            if self._keep:
                broker.terminate()  # All at once: alone, the last ones would wait in vain for a majority to sign off.
            else:
                broker.kill()
        for broker in self.brokers:
            broker.stop(timeout=15)
            broker.release_ports()
        if not self._keep:
            shutil.rmtree(self._data_dir, ignore_errors=True)

    def wait_until_ready(self, *brokers: LocalBroker, seconds: float = 90) -> None:
        """
        Return when each of *brokers*, by default all, serves requests and knows the others of them to serve, too.

        Raises:
            KafkaUnusableError: as start().
        """
        waiting_for = brokers or self.brokers
        expected = {broker.node_id for broker in waiting_for}
        deadline = time.monotonic() + seconds
        for broker in waiting_for:
            while not expected <= serving_brokers(_HOST, broker.port):
                if not broker.running or time.monotonic() > deadline:
                    what = f"was not ready in {seconds:.0f} s" if broker.running else "ended"
                    raise KafkaUnusableError(f"Broker {broker.node_id} {what}. Its log ends:\n{broker.log_tail()}")
                time.sleep(0.03)

    def create_topics(
        self, *names: str, partitions: int = 1, replication: int | None = None, config: Mapping[str, str] | None = None
    ) -> None:
        """Create topics as the function create_topics() does, by default with a replica on each broker, up to three."""
        replication = replication or min(len(self.brokers), 3)
        create_topics(self.bootstrap_servers, *names, partitions=partitions, replication=replication, config=config)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def prepare_runtime(on_progress: Progress | None = None) -> Runtime:
    """
    Return what brokers are started from, downloading Kafka the first time.

    Raises:
        JavaNotFoundError, DownloadError, KafkaUnusableError: it cannot be had; the message says what to do.
    """
    return prepare(_train, on_progress)


def _train(runtime: Runtime) -> bool:
    """Go once through what every start does; returns whether the broker ended cleanly, and so left an archive."""
    with contextlib.suppress(KafkaUnusableError), tempfile.TemporaryDirectory(prefix="relay-kafka-") as directory:  # noqa: SIM117
        with LocalKafka(data_dir=Path(directory), runtime=runtime) as kafka:
            kafka.create_topics("first")
            return kafka.brokers[0].stop(timeout=120)
    return False
