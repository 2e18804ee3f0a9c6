"""A Kafka in Docker, for tests: only if it can be had soon."""

import gc
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager

import docker  # type: ignore[import-untyped]
from docker.errors import DockerException, ImageNotFound  # type: ignore[import-untyped]
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from relay.dev.kafka_requests import serving_brokers

IMAGE = "apache/kafka:4.1.1"
ANSWER_SECONDS = 5
PULL_SECONDS = 60
START_SECONDS = 60


class DockerUnusableError(OSError):
    """Docker gives no Kafka; the message says why."""


@contextmanager
def kafka_in_docker() -> Iterator[str]:
    """
    Yield the address of a Kafka in a container, which is removed afterwards.

    Raises:
        DockerUnusableError: there is none: after 5 s if no daemon answers, after a minute if the image does not come.
    """
    client = _client()
    if client is None:
        raise DockerUnusableError("no daemon answers")
    with closing(client):
        try:
            _pull(client)
        except (DockerException, OSError) as error:
            raise DockerUnusableError(f"{IMAGE} cannot be had ({error})") from error
    testcontainers_config.ryuk_disabled = True  # One image less to get: the container is removed here.
    container, host, port = _container()
    try:
        try:
            container.start()
            _wait_until_serving(container, host, port)
        except (DockerException, OSError) as error:
            raise DockerUnusableError(f"{IMAGE} does not start ({error})") from error
        yield f"{host}:{port}"
    finally:
        container.stop()


def _client() -> docker.DockerClient | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # The client leaves its socket open when nobody listens.
        try:
            return docker.from_env(timeout=ANSWER_SECONDS)
        except DockerException:
            return None
        finally:
            gc.collect()


def _pull(client: docker.DockerClient) -> None:
    """Get the image unless it is there, in bounded time: a registry out of reach must not hold up the tests."""
    try:
        client.images.get(IMAGE)
    except ImageNotFound:
        deadline = time.monotonic() + PULL_SECONDS
        repository, _, tag = IMAGE.partition(":")
        for step in client.api.pull(repository, tag, stream=True, decode=True):
            if "error" in step:
                raise DockerException(step["error"]) from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"not pulled in {PULL_SECONDS} s") from None


def _container() -> tuple[DockerContainer, str, int]:
    container = DockerContainer(IMAGE)
    host = container.get_docker_client().host()
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    # The port must be known before: clients go where the broker says it is.
    container.with_bind_ports(port, port).with_envs(
        KAFKA_NODE_ID="0",
        KAFKA_PROCESS_ROLES="broker,controller",
        KAFKA_LISTENERS=f"PLAINTEXT://0.0.0.0:{port},CONTROLLER://localhost:1",
        KAFKA_ADVERTISED_LISTENERS=f"PLAINTEXT://{host}:{port}",
        KAFKA_CONTROLLER_LISTENER_NAMES="CONTROLLER",
        KAFKA_CONTROLLER_QUORUM_VOTERS="0@localhost:1",
        KAFKA_LISTENER_SECURITY_PROTOCOL_MAP="CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR="1",
        KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR="1",
        KAFKA_TRANSACTION_STATE_LOG_MIN_ISR="1",
        KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS="0",
        KAFKA_AUTO_CREATE_TOPICS_ENABLE="false",
    )
    return container, host, port


def _wait_until_serving(container: DockerContainer, host: str, port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not serving_brokers(host, port):
        if time.monotonic() > deadline:
            log = b"".join(container.get_logs()).decode(errors="replace")[-2000:]
            raise TimeoutError(f"not ready in {START_SECONDS} s; its log ends: {log}")
        time.sleep(0.2)
