"""What is measured, and how: rounds of the bare handler and the relay in turn, outages, starts, idling."""

import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from confluent_kafka import Consumer, TopicPartition

from relay.dev.kafka import LocalKafka

from .load import BODY_BYTES, Outcome, quantile
from .servers import TOPIC, BenchError, Cores, Relay, Sending, Server

#: Events a second that arrive where a budget says so.
ARRIVALS = 1000
_DRAIN_SECONDS = 300.0
#: Rate (0: saturation, 64 clients), whether connections are kept, budget of the ratio.
_COSTS = (
    (0, False, 1.35),
    (0, True, 1.5),
    (5000, False, 1.35),
    (5000, True, 1.5),
    (1000, False, 1.6),
    (1000, True, 1.6),
)
_LANDINGS_MS = {1: 100, 1000: 400, 5000: 400}


class Plan(NamedTuple):
    """How long and how often."""

    rounds: int
    #: Of one round.
    seconds: float
    slow_seconds: float
    idle_seconds: float
    starts: int
    backlog_bytes: int = 100_000_000
    #: Events in the spool for another start.
    large_spool: int = 0


class Row(NamedTuple):
    """One line of the table."""

    figure: str
    budget: str
    measured: str
    met: bool


class Bench:
    """One run of everything."""

    def __init__(self, kafka: LocalKafka, cores: Cores, directory: Path, plan: Plan) -> None:
        self._kafka = kafka
        self._cores = cores
        self._directory = directory
        self._plan = plan
        #: By rate and mode, for each round: CPU seconds an event of the bare handler and of the relay; what was sent.
        self._costs: dict[tuple[int, bool], list[tuple[float, float, Outcome]]] = {}
        #: By rate: seconds from accepted to committed, of each event of a round.
        self._landed: dict[int, list[list[float]]] = {}
        self._frozen: list[Outcome] = []
        self._fsync_p99: list[float] = []

    def run(self) -> Iterator[str | Row]:
        """Measures: gives the name of each step before it, and the rows as they are known."""
        plan = self._plan
        with self._relay("main") as relay, Server(self._cores, self._directory) as bare:
            yield "warming up"
            for server in (relay, bare):
                for keep_alive in (False, True):
                    self._send(server, 2, keep_alive=keep_alive)
                server.settle()
            for number in range(plan.rounds):
                for rate, keep_alive, _ in _COSTS:
                    yield f"round {number + 1} of {plan.rounds}: {_load(rate, keep_alive=keep_alive)}"
                    self._round(bare, relay, rate, keep_alive=keep_alive)
                yield f"round {number + 1} of {plan.rounds}: Kafka frozen; fsync"
                with self._frozen_kafka():
                    self._frozen.append(self._send(relay, plan.seconds, ARRIVALS))
                relay.settle()
                self._fsync_p99.append(self._fsync())
            yield "one event a second"
            self._send_and_watch(relay, plan.slow_seconds, 1)
        yield from self._rows()
        yield "starts"
        starts = [self._start(f"start-{number}") for number in range(plan.starts)]
        yield Row("start to ready, empty spool", "<= 1 s", f"{spread(starts)} s", median(starts) <= 1)
        with self._relay("outage") as relay:
            yield "idling"
            yield from self._idle(relay)
            yield "an outage"
            yield from self._outage(relay)
        if plan.large_spool:
            yield f"{plan.large_spool:,} events in the spool"
            with self._frozen_kafka():
                with self._relay("large") as relay:
                    self._fill(relay, plan.large_spool)
                start = self._start("large")
            yield Row(f"start to ready, {plan.large_spool:,} events spooled", "<= 2 s", f"{start:.2f} s", start <= 2)
        else:
            yield Row("start to ready, 1,000,000 events spooled", "<= 2 s", "not measured (--large)", met=False)
        yield Row("resident memory, 10 GB backlog", "<= 90 MB", "not measured", met=False)

    def _relay(self, name: str) -> Relay:
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        return Relay(self._cores, directory, self._kafka.bootstrap_servers)

    def _start(self, name: str) -> float:
        with self._relay(name) as relay:
            return relay.start_seconds

    def _send(self, server: Server, seconds: float, rate: int = 0, *, keep_alive: bool = False) -> Outcome:
        return Sending(self._cores, server, seconds, rate, keep_alive=keep_alive).outcome()

    def _round(self, bare: Server, relay: Relay, rate: int, *, keep_alive: bool) -> None:
        cpu: list[float] = []
        for server in (bare, relay):
            before = server.cpu_seconds
            if isinstance(server, Relay) and rate and not keep_alive:
                sent = self._send_and_watch(server, self._plan.seconds, rate)
            else:
                sent = self._send(server, self._plan.seconds, rate, keep_alive=keep_alive)
            server.settle()  # What was accepted is not done before it is on Kafka.
            cpu.append((server.cpu_seconds - before) / sent.events)
        self._costs.setdefault((rate, keep_alive), []).append((cpu[0], cpu[1], sent))

    def _send_and_watch(self, relay: Relay, seconds: float, rate: int) -> Outcome:
        with _landings(self._kafka.bootstrap_servers) as landed:
            sent = self._send(relay, seconds, rate)
            deadline = time.monotonic() + 10
            while len(landed) < sent.events and time.monotonic() < deadline:
                time.sleep(0.01)
        if len(landed) != sent.events:
            raise BenchError(f"{sent.events} events were accepted, {len(landed)} are on the topic.")
        self._landed.setdefault(rate, []).append(landed)
        return sent

    @contextmanager
    def _frozen_kafka(self) -> Iterator[None]:
        self._kafka.brokers[0].freeze()
        try:
            yield
        finally:
            self._kafka.brokers[0].thaw()

    def _fsync(self) -> float:
        # As the relay has it at that rate: on its core, an append every millisecond.
        took: list[float] = []
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores.server)
        with (self._directory / "fsync").open("wb", buffering=0) as file:
            while len(took) < ARRIVALS:
                file.write(bytes(4096))
                begun = time.perf_counter()
                os.fdatasync(file.fileno())
                took.append(time.perf_counter() - begun)
                time.sleep(max(0.0, 1 / ARRIVALS - took[-1]))
        os.sched_setaffinity(0, here)
        return quantile(took, 0.99)

    def _rows(self) -> Iterator[Row]:
        for rate, keep_alive, limit in _COSTS:
            rounds = self._costs[rate, keep_alive]
            ratios = [relay / bare for bare, relay, _ in rounds]
            bare_us, relay_us = [bare * 1e6 for bare, _, _ in rounds], [relay * 1e6 for _, relay, _ in rounds]
            measured = f"{spread(ratios)} x: {spread(relay_us, 0)} / {spread(bare_us, 0)} us"
            if not rate:
                measured += f"; {median(it.events / it.seconds for *_, it in rounds):,.0f}/s"
            figure = f"CPU per event, {_load(rate, keep_alive=keep_alive)}"
            yield Row(figure, f"<= {limit} x bare", measured, median(ratios) <= limit)
        for rate, limit in _LANDINGS_MS.items():
            p50, p99 = ([quantile(landed, share) * 1e3 for landed in self._landed[rate]] for share in (0.5, 0.99))
            measured = f"{spread(p99, 0)} ms (p50 {spread(p50, 0)})"
            yield Row(f"accepted to committed, {rate:,}/s, p99", f"<= {limit} ms", measured, median(p99) <= limit)
        up = [it for *_, it in self._costs[ARRIVALS, False]]
        yield _latency("up", up, 4.0, "fsync p99", self._fsync_p99)
        yield _latency("frozen", self._frozen, 1.2, "p99 with Kafka up", [it.p99 for it in up])

    def _idle(self, relay: Relay) -> Iterator[Row]:
        relay.settle()
        time.sleep(2)  # What a start leaves to be done.
        yield _memory("idle", relay.resident_bytes, 60)
        before = relay.cpu_seconds
        time.sleep(self._plan.idle_seconds)
        share = (relay.cpu_seconds - before) / self._plan.idle_seconds
        yield Row("CPU, idle", "<= 0.5 % of a core", f"{share:.3%}", share <= 0.005)

    def _outage(self, relay: Relay) -> Iterator[Row]:
        with self._frozen_kafka():
            self._fill(relay, self._plan.backlog_bytes // BODY_BYTES)
            yield _memory(f"{self._plan.backlog_bytes / 1e6:.0f} MB backlog", relay.resident_bytes, 90)
            sending = Sending(self._cores, relay, _DRAIN_SECONDS, ARRIVALS)
            time.sleep(1)
        yield catch_up(relay)
        sending.stop()
        sending.outcome()

    def _fill(self, relay: Relay, events: int) -> None:
        while relay.depth < events:
            self._send(relay, 2, keep_alive=True)


@contextmanager
def _landings(bootstrap_servers: str) -> Iterator[list[float]]:
    # Gives a list that grows by the seconds from accepted to committed of each event: its record's timestamp, and when
    # a read_committed consumer sees it.
    settings = {"bootstrap.servers": bootstrap_servers, "group.id": str(uuid.uuid4()), "enable.auto.commit": False}
    consumer = Consumer({**settings, "isolation.level": "read_committed"})
    places = [TopicPartition(TOPIC, it) for it in consumer.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions]
    for place in places:
        _, place.offset = consumer.get_watermark_offsets(place, timeout=10)
    consumer.assign(places)
    landed: list[float] = []
    left = threading.Event()

    def read() -> None:
        while not left.is_set():
            messages = consumer.consume(500, timeout=0.1)
            now = time.time()
            landed.extend(now - message.timestamp()[1] / 1000 for message in messages if not message.error())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield landed
    finally:
        left.set()
        thread.join()
        consumer.close()


def catch_up(relay: Relay) -> Row:
    """How fast a backlog goes once Kafka is back, while ARRIVALS go on."""
    back = time.perf_counter()
    backlog, begun, published_then = relay.depth, 0.0, 0
    while True:
        time.sleep(0.05)
        now, depth, published = time.perf_counter(), relay.depth, relay.published
        if not begun and depth < backlog:
            begun, published_then = now, published
        backlog = max(backlog, depth)
        if begun and depth < ARRIVALS // 2:
            break
        if now > back + _DRAIN_SECONDS:
            raise BenchError(f"Kafka is back, but {depth} events still wait.")
    rate = (published - published_then) / (now - begun)
    measured = (
        f"{rate / ARRIVALS:.1f} x: {rate:,.0f}/s, done in {now - begun:.1f} s; resumed after {begun - back:.1f} s"
    )
    figure = f"catch-up of {backlog:,} events, {ARRIVALS:,}/s arriving"
    return Row(figure, ">= 10 x arrivals", measured, rate >= 10 * ARRIVALS)


def _latency(kafka: str, sent: list[Outcome], limit: float, of: str, base: list[float]) -> Row:
    ratio = median(it.p99 for it in sent) / median(base)
    p50, p99 = spread((it.p50 * 1e3 for it in sent), 1), spread((it.p99 * 1e3 for it in sent), 1)
    measured = f"{ratio:.1f} x {spread((it * 1e3 for it in base), 1)}: {p99} ms (p50 {p50})"
    return Row(f"accept latency, {ARRIVALS:,}/s, Kafka {kafka}, p99", f"<= {limit:g} x {of}", measured, ratio <= limit)


def _memory(when: str, resident: int, limit: int) -> Row:
    return Row(f"resident memory, {when}", f"<= {limit} MB", f"{resident / 1e6:.0f} MB", resident <= limit * 1e6)


def _load(rate: int, *, keep_alive: bool) -> str:
    return f"{f'{rate:,}/s' if rate else 'saturation'}, {'keep-alive' if keep_alive else 'a connection per event'}"


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The median, with the least and the largest."""
    ordered = sorted(values)
    middle = f"{median(ordered):.{digits}f}"
    return middle if len(ordered) == 1 else f"{middle} ({ordered[0]:.{digits}f}-{ordered[-1]:.{digits}f})"
