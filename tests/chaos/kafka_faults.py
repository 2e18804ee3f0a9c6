"""Faults of Kafka, its network and the registry: each undoes its cause, and returns what there is to note."""

import random
import time

from acceptance.bodies import message, new_chat
from confluent_kafka import ElectionType, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from relay_process import wait_until

from .ledger import Chat
from .schedule import Step
from .world import DEAD_LETTERS, PATIENCE, TOPIC, WATERMARKS, Fault, NoEffect, World

_SIZE_LIMIT = 100_000
_LARGE = 400_000
_TRANSACTIONS = "__transaction_state"


# --- The network. ---


def reset_connections(world: World, step: Step) -> None:
    world.proxies.reset()
    time.sleep(step.seconds)
    world.proxies.reset()


def cut_connections(world: World, step: Step) -> str:
    rng = random.Random(step.seed)
    after = [rng.randrange(1, 10 ** rng.randint(2, 6)) for _ in range(rng.randint(1, 3))]
    for size in after:
        world.proxies.cut(size)
        time.sleep(step.seconds)
        wait_until(lambda: not world.proxies.cutting, "a connection is cut", seconds=PATIENCE)
    return f"after {', '.join(map(str, after))} bytes"


def delay_connections(world: World, step: Step) -> str:
    delay = random.Random(step.seed).choice((0.02, 0.2, 0.6))
    world.proxies.delay(delay)
    time.sleep(step.seconds)
    world.proxies.delay(0)
    return f"{delay} s each way"


# --- Kafka. ---


def kill_broker(world: World, step: Step) -> None:
    broker = world.kafka.brokers[step.broker]
    broker.kill()
    time.sleep(step.seconds)
    broker.start()


def restart_broker(world: World, step: Step) -> None:
    world.kafka.brokers[step.broker].restart()


def freeze_broker(world: World, step: Step) -> None:
    broker = world.kafka.brokers[step.broker]
    broker.freeze()
    time.sleep(step.seconds)
    broker.thaw()
    world.kafka.wait_until_ready(broker)


def restart_brokers(world: World, step: Step) -> None:
    for broker in world.kafka.brokers:
        broker.terminate()
    for broker in world.kafka.brokers:
        broker.stop()
    _start_brokers(world)


def stop_two_brokers(world: World, step: Step) -> None:
    for broker in world.kafka.brokers:
        if broker.node_id != step.broker:
            broker.kill()
    time.sleep(step.seconds)
    _start_brokers(world)


def kill_coordinator(world: World, step: Step) -> str:
    wait_until(lambda: min(world.leaders(_TRANSACTIONS)) >= 0, "every transaction has a coordinator", seconds=60)
    leaders = world.leaders(_TRANSACTIONS)
    identity = f"relay-{world.relay.status()['spool']['identity']}"
    broker = world.kafka.brokers[leaders[_java_hash(identity) % len(leaders)]]
    broker.kill()
    world.relay.kill()
    time.sleep(step.seconds)
    world.start_relay()
    broker.start()
    return f"broker {broker.node_id}"


def orphan_partition(world: World, step: Step) -> None:
    # Its only replica is there (World.create_topics).
    broker = world.kafka.brokers[0]
    broker.kill()
    others = world.kafka.brokers[1:]
    wait_until(lambda: world.leaders(DEAD_LETTERS) == [-1], "the partition has no leader", seconds=60, pause=0.2)
    assert all(other.running for other in others)
    time.sleep(step.seconds)
    broker.start()


def undercut_in_sync_replicas(world: World, step: Step) -> None:
    broker = world.kafka.brokers[step.broker]
    _set_topic_config(world, "min.insync.replicas", str(len(world.kafka.brokers)))
    try:
        broker.kill()
        wait_until(lambda: world.in_sync(TOPIC) < len(world.kafka.brokers), "replicas fall out of sync", seconds=60)
        time.sleep(step.seconds)
        broker.start()
    finally:
        _set_topic_config(world, "min.insync.replicas", None)


def move_leaders(world: World, step: Step) -> str:
    world.kafka.brokers[step.broker].restart()
    before = _leaders(world)
    partitions = [TopicPartition(topic, number) for topic, number in before]
    admin = world.new_admin()
    # A broker that has just come back is in sync a little later; until then this is refused for its partitions.
    deadline = time.monotonic() + 30
    while True:
        admin.elect_leaders(ElectionType.PREFERRED, partitions).result(60)
        after = _leaders(world)
        moved = sum(before[place] != after[place] for place in before)
        if moved:
            return f"{moved} moved"
        if time.monotonic() > deadline:
            raise NoEffect
        time.sleep(0.5)


def recreate_topic(world: World, step: Step) -> str:
    with world.reading:
        with world.load.paused():
            # All that was accepted is on the topic, and has been read: nothing need be excused.
            world.relay.wait_until_drained(seconds=PATIENCE)
            world.read_to_the_end()
            admin = world.new_admin()
            for future in admin.delete_topics([TOPIC], operation_timeout=30).values():
                future.result(60)
            wait_until(lambda: TOPIC not in admin.list_topics(timeout=30).topics, "it is gone", seconds=60, pause=0.1)
            time.sleep(1)  # Not every broker knows at once, and one that does not may take what it then forgets.
        accepted = world.ledger.accepted
        time.sleep(step.seconds)
        wait_until(lambda: world.ledger.accepted > accepted, "events come while there is no topic")
        world.create_topics(TOPIC)
        world.forget_position(TOPIC)
    return f"{world.ledger.accepted - accepted} events were accepted meanwhile"


def lower_size_limit(world: World, step: Step) -> str:
    rng = random.Random(step.seed)
    _set_topic_config(world, "max.message.bytes", str(_SIZE_LIMIT))
    try:
        sent = 0
        for _ in range(rng.randint(1, 3)):
            # Noise: compressed, too, it is larger than the limit.
            body = message(new_chat(), text=rng.randbytes(_LARGE // 2).hex())
            world.deliver(world.relay, Chat(), body, large=True)
            sent += 1
        time.sleep(step.seconds)
        world.wait_until_recovered()
    finally:
        _set_topic_config(world, "max.message.bytes", None)
    return f"{sent} bodies of {_LARGE} bytes"


def stop_registry(world: World, step: Step) -> None:
    assert world.registry
    world.registry.kill()
    world.relay.kill()
    world.start_relay()
    time.sleep(step.seconds)
    world.registry.start()


def _start_brokers(world: World) -> None:
    for broker in world.kafka.brokers:
        broker.start(wait=False)
    world.kafka.wait_until_ready()


def _leaders(world: World) -> dict[tuple[str, int], int]:
    topics = (TOPIC, DEAD_LETTERS, WATERMARKS, _TRANSACTIONS)
    return {(topic, number): leader for topic in topics for number, leader in enumerate(world.leaders(topic))}


def _set_topic_config(world: World, name: str, value: str | None) -> None:
    resource = ConfigResource(ResourceType.TOPIC, TOPIC)
    operation = AlterConfigOpType.DELETE if value is None else AlterConfigOpType.SET
    resource.add_incremental_config(ConfigEntry(name, value, incremental_operation=operation))

    def is_set() -> bool:
        admin = world.new_admin()
        try:
            for future in admin.incremental_alter_configs([resource]).values():
                future.result(60)
        except KafkaException:
            return False  # The fault before this one may have left a broker that is still to come back.
        return True

    wait_until(is_set, f"{name} is set", seconds=PATIENCE, pause=1)


def _java_hash(text: str) -> int:
    value = 0
    for character in text:
        value = value * 31 + ord(character) & 0xFFFFFFFF
    return abs(value - (1 << 32) if value >> 31 else value)


FAULTS: dict[str, Fault] = {
    "connections to Kafka reset": reset_connections,
    "connections to Kafka cut in the middle": cut_connections,
    "connections to Kafka delayed": delay_connections,
    "broker killed": kill_broker,
    "broker restarted": restart_broker,
    "broker frozen": freeze_broker,
    "broker frozen beyond the request timeout": freeze_broker,
    "broker frozen beyond the transaction timeout": freeze_broker,
    "all brokers restarted": restart_brokers,
    "two of three brokers down": stop_two_brokers,
    "transaction coordinator and relay killed": kill_coordinator,
    "in-sync replicas below the minimum": undercut_in_sync_replicas,
    "partition without a leader": orphan_partition,
    "leaders moved": move_leaders,
    "topic deleted and made again": recreate_topic,
    "max.message.bytes below a body": lower_size_limit,
    "schema registry down": stop_registry,
}
