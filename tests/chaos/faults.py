"""The faults themselves: each function does one to the world, undoes its cause, and returns what there is to note."""

import random
import time
from collections.abc import Callable

from acceptance.bodies import message, new_chat
from acceptance.http_client import post
from confluent_kafka import ElectionType, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from relay_process import wait_until

from . import wal
from .ledger import Chat
from .schedule import Step
from .syscalls import Control
from .world import DEAD_LETTERS, TOPIC, WATERMARKS, World

Fault = Callable[[World, Step], str | None]
FAULTS: dict[str, Fault] = {}

_HOUR = 3600.0
_SIZE_LIMIT = 100_000
_LARGE = 400_000
_TRANSACTIONS = "__transaction_state"


def fault(*names: str) -> Callable[[Fault], Fault]:
    """Registers a function for the kinds with these names."""

    def register(function: Fault) -> Fault:
        FAULTS.update(dict.fromkeys(names, function))
        return function

    return register


# --- The relay. ---


@fault("relay killed")
def kill_relay(world: World, step: Step) -> None:
    world.relay.kill()
    time.sleep(step.seconds)
    world.start_relay()


@fault("relay stopped")
def stop_relay(world: World, step: Step) -> None:
    code = world.relay.stop()
    assert code == 0, f"stopped with exit code {code}:\n{world.relay.log_tail()}"
    time.sleep(step.seconds)
    world.start_relay()


@fault("relay frozen", "relay frozen beyond the transaction timeout")
def freeze_relay(world: World, step: Step) -> None:
    world.relay.freeze()
    time.sleep(step.seconds)
    world.relay.thaw()


@fault("frozen relay thawed beside its successor")
def succeed_relay(world: World, step: Step) -> str:
    former = world.relay
    former.freeze()
    frozen_at = time.monotonic()
    world.relay = world.new_relay(world.copy_spool(live=False))
    world.start_relay()
    # From here on tries go to the successor; those that wait for the former's answer must have given that up before it
    # is thawed, or it would answer for events that the successor never sees.
    world.load.send_to(world.relay.port)
    world.ledger.excuse_doubled()
    wait_until(lambda: not world.load.under_way(former.port), "nobody waits for the frozen relay")
    frozen = time.monotonic() - frozen_at
    former.thaw()
    time.sleep(step.seconds)
    former.close()
    world.wait_until_recovered()
    return f"frozen for {frozen:.1f} s"


@fault("second relay on a copy of the spool")
def start_twin(world: World, step: Step) -> str:
    twin = world.new_relay(world.copy_spool(live=True))
    twin.start()
    chat, events = new_chat(), Chat()
    until = time.monotonic() + step.seconds
    while time.monotonic() < until:
        body = message(chat, events.sent)
        event = world.ledger.send(events, body)
        assert post(twin.port, body).status == 200
        world.ledger.answered(event)
        time.sleep(0.02)
    # Both publish with one identity and throw each other out again and again; alone, each comes to its end.
    world.relay.freeze()
    twin.wait_until_drained()
    twin.close()
    world.relay.thaw()
    world.wait_until_recovered()
    return f"took {events.sent} events, was thrown out {len(twin.log('kafka_lost'))} times"


@fault("clock an hour forth", "clock an hour back")
def set_clock(world: World, step: Step) -> str:
    seconds = _clock_error(world, step)
    with _control(world).clock_off(seconds):
        time.sleep(step.seconds)
    return f"{seconds:+.0f} s"


@fault("relay restarted with its clock an hour off")
def restart_with_wrong_clock(world: World, step: Step) -> str:
    seconds = _clock_error(world, step)
    with _control(world).clock_off(seconds):
        _restart_forgetful(world)
        time.sleep(step.seconds)
    _restart_forgetful(world)
    return f"{seconds:+.0f} s"


# --- Its disk. ---


@fault("disk full", "disk error on write", "disk error on fsync")
def break_disk(world: World, step: Step) -> str:
    control = _control(world)
    failed = control.failed
    full, syncs = step.kind == "disk full", step.kind.endswith("fsync")
    with control.disk_full() if full else control.disk_broken(syncs=syncs):
        time.sleep(step.seconds)
    return f"{control.failed - failed} calls failed"


@fault("spool file cannot grow")
def limit_spool(world: World, step: Step) -> None:
    # Where the files end now: what is written over goes on, what would be longer is refused.
    wal_path = world.relay.spool_path.with_name(f"{world.relay.spool_path.name}-wal")
    size = random.Random(step.seed).randrange(wal_path.stat().st_size + 1)
    world.relay.limit_file_size(size)
    time.sleep(step.seconds)
    world.relay.limit_file_size(-1)


@fault("last frames of the WAL torn")
def tear_wal(world: World, step: Step) -> str:
    path = world.relay.spool_path
    with _control(world).commit_held():
        world.relay.kill()
    torn = wal.tear(path.with_name(f"{path.name}-wal"), random.Random(step.seed))
    world.start_relay()
    return torn


# --- The senders and the network. ---


@fault("senders cut off")
def cut_senders(world: World, step: Step) -> str:
    count = random.Random(step.seed).randrange(1, 200)
    world.load.cut(count)
    wait_until(lambda: not world.load.cutting, "senders are cut off", seconds=60)
    return f"{count} of them"


@fault("connections to Kafka reset")
def reset_connections(world: World, step: Step) -> None:
    world.proxies.reset()
    time.sleep(step.seconds)
    world.proxies.reset()


@fault("connections to Kafka cut in the middle")
def cut_connections(world: World, step: Step) -> str:
    rng = random.Random(step.seed)
    after = [rng.randrange(1, 10 ** rng.randint(2, 6)) for _ in range(rng.randint(1, 3))]
    for size in after:
        world.proxies.cut(size)
        time.sleep(step.seconds)
    return f"after {', '.join(map(str, after))} bytes"


@fault("connections to Kafka delayed")
def delay_connections(world: World, step: Step) -> str:
    delay = random.Random(step.seed).choice((0.02, 0.2, 0.6))
    world.proxies.delay(delay)
    time.sleep(step.seconds)
    world.proxies.delay(0)
    return f"{delay} s each way"


# --- Kafka. ---


@fault("broker killed")
def kill_broker(world: World, step: Step) -> None:
    broker = world.kafka.brokers[step.broker]
    broker.kill()
    time.sleep(step.seconds)
    broker.start()


@fault("broker restarted")
def restart_broker(world: World, step: Step) -> None:
    world.kafka.brokers[step.broker].restart()


@fault("broker frozen", "broker frozen beyond the request timeout", "broker frozen beyond the transaction timeout")
def freeze_broker(world: World, step: Step) -> None:
    broker = world.kafka.brokers[step.broker]
    broker.freeze()
    time.sleep(step.seconds)
    broker.thaw()
    world.kafka.wait_until_ready(broker)


@fault("all brokers restarted")
def restart_brokers(world: World, step: Step) -> None:
    for broker in world.kafka.brokers:
        broker.terminate()
    for broker in world.kafka.brokers:
        broker.stop()
    _start_brokers(world)


@fault("two of three brokers down")
def stop_two_brokers(world: World, step: Step) -> None:
    for broker in world.kafka.brokers:
        if broker.node_id != step.broker:
            broker.kill()
    time.sleep(step.seconds)
    _start_brokers(world)


@fault("transaction coordinator and relay killed")
def kill_coordinator(world: World, step: Step) -> str:
    leaders = world.leaders(_TRANSACTIONS)
    identity = f"relay-{world.relay.status()['spool']['identity']}"
    broker = world.kafka.brokers[leaders[_java_hash(identity) % len(leaders)]]
    broker.kill()
    world.relay.kill()
    time.sleep(step.seconds)
    world.start_relay()
    broker.start()
    return f"broker {broker.node_id}"


@fault("partition without a leader")
def orphan_partition(world: World, step: Step) -> None:
    # Its only replica is there (World.create_topics).
    broker = world.kafka.brokers[0]
    broker.kill()
    others = world.kafka.brokers[1:]
    wait_until(lambda: world.leaders(DEAD_LETTERS) == [-1], "the partition has no leader", seconds=60, pause=0.2)
    assert all(other.running for other in others)
    time.sleep(step.seconds)
    broker.start()


@fault("leaders moved")
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
        if moved or time.monotonic() > deadline:
            return f"{moved} moved"
        time.sleep(0.5)


@fault("topic deleted and made again")
def recreate_topic(world: World, step: Step) -> str:
    world.wait_until_recovered()
    with world.reading:
        for _ in range(3):  # Each time there is less that landed while it was read.
            world.read_to_the_end()
        admin = world.new_admin()
        for future in admin.delete_topics([TOPIC], operation_timeout=30).values():
            future.result(60)
        wait_until(lambda: TOPIC not in admin.list_topics(timeout=30).topics, "it is gone", seconds=60, pause=0.1)
        # Not every broker knows at once.
        gone_at = time.monotonic() + 0.5
        time.sleep(step.seconds)
        world.create_topics(TOPIC)
        world.forget_position(TOPIC)
    world.wait_until_recovered()
    world.read_to_the_end()
    return f"{world.ledger.excuse_lost('on a deleted topic', sent_before=gone_at)} events were on it alone"


@fault("max.message.bytes below a body")
def lower_size_limit(world: World, step: Step) -> str:
    rng = random.Random(step.seed)
    _set_size_limit(world, _SIZE_LIMIT)
    try:
        sent = 0
        for _ in range(rng.randint(1, 3)):
            # Noise: compressed, too, it is larger than the limit.
            body = message(new_chat(), text=rng.randbytes(_LARGE // 2).hex())
            event = world.ledger.send(Chat(), body, large=True)
            assert post(world.relay.port, body).status == 200
            world.ledger.answered(event)
            sent += 1
        time.sleep(step.seconds)
        world.wait_until_recovered()
    finally:
        _set_size_limit(world, None)
    return f"{sent} bodies of {_LARGE} bytes"


@fault("schema registry down")
def stop_registry(world: World, step: Step) -> None:
    assert world.registry
    world.registry.kill()
    world.relay.kill()
    world.start_relay()
    time.sleep(step.seconds)
    world.registry.start()


def _clock_error(world: World, step: Step) -> float:
    rng = random.Random(step.seed)
    seconds = _HOUR + rng.uniform(-60, 60)
    if step.kind.endswith("back") or (step.kind.endswith("off") and rng.random() < 0.5):
        return -seconds
    world.ledger.clock_ahead = max(world.ledger.clock_ahead, seconds)
    return seconds


def _restart_forgetful(world: World) -> None:
    world.relay.kill()
    world.ledger.excuse_doubled()
    world.start_relay()


def _control(world: World) -> Control:
    assert world.control, "scheduled only where there is one"
    return world.control


def _start_brokers(world: World) -> None:
    for broker in world.kafka.brokers:
        broker.start(wait=False)
    world.kafka.wait_until_ready()


def _leaders(world: World) -> dict[tuple[str, int], int]:
    topics = (TOPIC, DEAD_LETTERS, WATERMARKS, _TRANSACTIONS)
    return {(topic, number): leader for topic in topics for number, leader in enumerate(world.leaders(topic))}


def _set_size_limit(world: World, size: int | None) -> None:
    resource = ConfigResource(ResourceType.TOPIC, TOPIC)
    operation = AlterConfigOpType.DELETE if size is None else AlterConfigOpType.SET
    resource.add_incremental_config(
        ConfigEntry("max.message.bytes", None if size is None else str(size), incremental_operation=operation)
    )
    admin = world.new_admin()
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(60)


def _java_hash(text: str) -> int:
    value = 0
    for character in text:
        value = value * 31 + ord(character) & 0xFFFFFFFF
    return abs(value - (1 << 32) if value >> 31 else value)
