"""Faults of the relay, its clock, disk and senders: each undoes its cause, and returns what there is to note."""

import random
import time

from acceptance.bodies import message, new_chat
from relay_process import wait_until

from . import wal
from .ledger import Chat
from .schedule import Step
from .syscalls import Control
from .world import PATIENCE, Fault, NoEffect, World

_HOUR = 3600.0
_CLOCK_SLACK = 60.0


# --- The relay. ---


def kill_relay(world: World, step: Step) -> None:
    world.relay.kill()
    time.sleep(step.seconds)
    world.start_relay()


def stop_relay(world: World, step: Step) -> None:
    code = world.relay.stop()
    assert code == 0, f"stopped with exit code {code}:\n{world.relay.log_tail()}"
    time.sleep(step.seconds)
    world.start_relay()


def freeze_relay(world: World, step: Step) -> None:
    world.relay.freeze()
    time.sleep(step.seconds)
    world.relay.thaw()


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


def start_twin(world: World, step: Step) -> str:
    twin = world.new_relay(world.copy_spool(live=True))
    twin.start()
    chat, events = new_chat(), Chat()
    until = time.monotonic() + step.seconds
    while time.monotonic() < until:
        body = message(chat, events.sent)
        world.deliver(twin, events, body)
        time.sleep(0.02)
    # Both publish with one identity and throw each other out again and again; alone, each comes to its end.
    world.relay.freeze()
    twin.wait_until_drained()
    twin.close()
    world.relay.thaw()
    world.wait_until_recovered()
    if not (times := len(twin.log("kafka_lost"))):
        raise NoEffect
    return f"took {events.sent} events, was thrown out {times} times"


def set_clock(world: World, step: Step) -> str:
    seconds = _clock_error(world, step)
    with _control(world).clock_off(seconds):
        _wait_for_clock(world, seconds)
        time.sleep(step.seconds)
    return f"{seconds:+.0f} s"


def restart_with_wrong_clock(world: World, step: Step) -> str:
    seconds = _clock_error(world, step)
    with _control(world).clock_off(seconds):
        _restart_forgetful(world)
        _wait_for_clock(world, seconds)
        time.sleep(step.seconds)
    _restart_forgetful(world)
    return f"{seconds:+.0f} s"


# --- Its disk. ---


def break_disk(world: World, step: Step) -> str:
    control = _control(world)
    failed = control.failed
    full, syncs = step.kind == "disk full", step.kind.endswith("fsync")
    with control.disk_full() if full else control.disk_broken(syncs=syncs):
        time.sleep(step.seconds)
        # The relay may be frozen meanwhile.
        wait_until(lambda: control.failed > failed, "a call fails", seconds=PATIENCE)
    return f"{control.failed - failed} calls failed"


def limit_spool(world: World, step: Step) -> None:
    # Where the files end now: what is written over goes on, what would be longer is refused.
    wal_path = world.relay.spool_path.with_name(f"{world.relay.spool_path.name}-wal")
    size = random.Random(step.seed).randrange(wal_path.stat().st_size + 1)
    world.relay.limit_file_size(size)
    time.sleep(step.seconds)
    world.relay.limit_file_size(-1)


def tear_wal(world: World, step: Step) -> str:
    path = world.relay.spool_path
    log = path.with_name(f"{path.name}-wal")
    # The first transaction in a log is preceded by an fsync of its header alone.
    wait_until(
        lambda: log.exists() and bool(wal.frames(log.read_bytes())), "the log has transactions", seconds=PATIENCE
    )
    with _control(world).commit_held():
        world.relay.kill()
    torn = wal.tear(log, random.Random(step.seed))
    world.start_relay()
    if torn is None:
        raise NoEffect
    return torn


# --- Its senders. ---


def cut_senders(world: World, step: Step) -> str:
    count = random.Random(step.seed).randrange(1, 200)
    world.load.cut(count)
    wait_until(lambda: not world.load.cutting, "senders are cut off", seconds=60)
    return f"{count} of them"


def _clock_error(world: World, step: Step) -> float:
    rng = random.Random(step.seed)
    seconds = _HOUR + rng.uniform(-60, 60)
    if step.kind.endswith("back") or (step.kind.endswith("off") and rng.random() < 0.5):
        return -seconds
    world.ledger.clock_ahead = max(world.ledger.clock_ahead, seconds)
    return seconds


def _wait_for_clock(world: World, seconds: float) -> None:
    wait_until(lambda: abs(world.relay.clock() - time.time() - seconds) < _CLOCK_SLACK, "the relay's clock is off")


def _restart_forgetful(world: World) -> None:
    world.relay.kill()
    world.ledger.excuse_doubled()
    world.start_relay()


def _control(world: World) -> Control:
    assert world.control, "scheduled only where there is one"
    return world.control


FAULTS: dict[str, Fault] = {
    "relay killed": kill_relay,
    "relay stopped": stop_relay,
    "relay frozen": freeze_relay,
    "relay frozen beyond the transaction timeout": freeze_relay,
    "frozen relay thawed beside its successor": succeed_relay,
    "second relay on a copy of the spool": start_twin,
    "clock an hour forth": set_clock,
    "clock an hour back": set_clock,
    "relay restarted with its clock an hour off": restart_with_wrong_clock,
    "disk full": break_disk,
    "disk error on write": break_disk,
    "disk error on fsync": break_disk,
    "spool file cannot grow": limit_spool,
    "last frames of the WAL torn": tear_wal,
    "senders cut off": cut_senders,
}
