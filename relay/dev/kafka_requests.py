"""Two requests to a Kafka, from any thread and without a client that stays: is it there, and create these topics."""

import asyncio
import socket
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor


def serving_brokers(host: str, port: int) -> set[int]:
    """Return the ids of the brokers that serve, as the one at *port* knows them: none if it does not answer in 2 s."""
    request = struct.pack(">hhihi", 3, 1, 0, -1, 0)  # Metadata, version 1: no client id, no topics.
    try:
        with socket.create_connection((host, port), timeout=2) as connection, connection.makefile("rb") as answer:
            connection.sendall(struct.pack(">i", len(request)) + request)
            _size, _correlation, count = struct.unpack(">iii", answer.read(12))
            serving = set()
            for _ in range(count):
                node_id, host_length = struct.unpack(">ih", answer.read(6))
                _host, _port, rack_length = struct.unpack(f">{host_length}sih", answer.read(host_length + 6))
                answer.read(max(rack_length, 0))
                serving.add(node_id)
            return serving
    except (OSError, struct.error):
        return set()


def create_topics(
    bootstrap_servers: str,
    *names: str,
    partitions: int = 1,
    replication: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    """
    Create topics of one shape.

    Raises:
        aiokafka.errors.KafkaError: a broker refused one, for example with TopicAlreadyExistsError.
    """
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic  # noqa: PLC0415 (slow to import, and only for this)
    from aiokafka.errors import for_code  # noqa: PLC0415

    async def create() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
        await admin.start()
        try:
            topics = [NewTopic(name, partitions, replication, topic_configs=dict(config or {})) for name in names]
            answer = await admin.create_topics(topics)
            for name, code, *message in answer.topic_errors:
                if code:
                    raise for_code(code)(f"{name}: {' '.join(map(str, message))}")
        finally:
            await admin.close()

    # In a thread of its own, since the caller's may be running an event loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, create()).result()
