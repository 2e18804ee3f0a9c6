"""
Long runs: `make soak`; for a first look `python -m tests.bench.soak --outage 1 --backlog 50000 --steady 1`;
0 leaves one out.

Three runs against a real Kafka: Kafka away while deliveries go on; a large backlog that is met by a restart after
SIGKILL; and a steady load, under which nothing may grow. Each ends with a look at what lies on the topic.
"""

import argparse
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from relay.dev.download import console_progress
from relay.dev.kafka import LocalKafka, prepare_runtime
from relay.ingress import SENDER_PATIENCE

from .__main__ import machine, table
from .landed import landed
from .load import Outcome
from .measure import ARRIVALS, Row, catch_up, spread
from .servers import BenchError, Cores, Relay, Sending

#: Seconds of one look at latency and memory.
_SLICE = 20.0
#: How many of them before an outage, and after it.
_SLICES = 6
_SAMPLE_SECONDS = 5.0
#: More than the dedupe window: what it covers may be too much to give the file back.
_GIVEN_BACK_SECONDS = 420.0
_SMALL_BYTES = 16 << 20
_LONG = 20 * 60.0
_ENDLESS = 24 * 3600.0
_MEMORY_LIMIT = 90e6
_TABLES = ("spool", "published", "runs", "dead", "requests", "schema_ids", "probe")
#: These hold what the dedupe window covers, and what waits for Kafka: they go up and down.
_PASSING_TABLES = ("batches", "digests", "repeats")


class Sample(NamedTuple):
    """What a relay holds at one moment."""

    resident_bytes: int
    handles: int
    file_bytes: int
    #: In the tables of the spool that hold neither events nor the dedupe window, and in those that do.
    rows: int
    passing_rows: int


class Soak:
    """One run: a relay with a spool and a topic of its own, and the numbers of the events that it has accepted."""

    def __init__(self, name: str, kafka: LocalKafka, cores: Cores, directory: Path) -> None:
        directory = directory / name
        directory.mkdir()
        self._topic = f"soak-{name}"
        self._kafka = kafka
        self._cores = cores
        self._relay = Relay(cores, directory, kafka.bootstrap_servers, self._topic)
        self._accepted: list[range] = []
        self._memory = 0
        #: What was sent while a backlog was published, or its file given back.
        self._meanwhile: list[Outcome] = []

    def outage(self, seconds: float) -> Iterator[Row]:
        """Kafka away for that long, compared with before; and after, as machines themselves get faster and slower."""
        with self._relay as relay:
            self._send(_SLICE / 4)
            before = [self._send(_SLICE) for _ in range(_SLICES)]
            self._kafka.brokers[0].kill()
            away, begun = [], time.monotonic()
            while time.monotonic() < begun + seconds:
                away.append(self._send(_SLICE))
                _say(f"{relay.depth:,} events wait; p99 {away[-1].p99 * 1e3:.1f} ms; {_memory(relay)}")
            peak = relay.spool_bytes
            with self._sending():
                self._kafka.brokers[0].start()
                caught_up = catch_up(relay)
            after = [self._send(_SLICE) for _ in range(_SLICES)]
            self._meanwhile += after
            yield from _latency(f"Kafka away for {seconds / 60:g} min", away, before, after)
            yield caught_up
            yield from self._ending(peak)

    def backlog(self, events: int) -> Iterator[Row]:
        """Killed and started again with so many events in the spool."""
        (broker,) = self._kafka.brokers
        with self._relay as relay:
            self._send(_SLICE / 4)
            before = [self._send(_SLICE) for _ in range(_SLICES)]
            broker.freeze()
            while relay.depth < events:
                self._send(_SLICE, rate=0)
                _say(f"{relay.depth:,} events wait; {_memory(relay)}")
            waiting, peak = relay.depth, relay.spool_bytes
        with self._relay as relay:
            took = relay.start_seconds
            yield Row(f"start to ready after SIGKILL, {waiting:,} events spooled", "<= 2 s", f"{took:.2f} s", took <= 2)
            waited = [self._send(_SLICE) for _ in range(_SLICES)]
            with self._sending():
                broker.thaw()
                yield catch_up(relay)
            after = [self._send(_SLICE) for _ in range(_SLICES)]
            self._meanwhile += after
            yield from _latency(f"{waiting:,} events waiting", waited, before, after)
            yield from self._ending(peak)

    def steady(self, seconds: float) -> Iterator[Row]:
        """The same load all the time."""
        with self._relay:
            samples, begun = [], time.monotonic()
            with self._sending(mixed=True):
                while time.monotonic() < begun + seconds:
                    time.sleep(_SAMPLE_SECONDS)
                    samples.append(self._sample())
            # The first quarter is the start and the dedupe window.
            quarter = len(samples) // 4
            early, late = samples[quarter : 2 * quarter], samples[-quarter:]
            for figure, unit, slack in (
                ("resident_bytes", 1e6, 2e6),
                ("handles", 1, 5),
                ("file_bytes", 1e6, 4e6),
                ("rows", 1, 0),
                # Not before the dedupe window is over.
                *([("passing_rows", 1, 2000)] if seconds >= _LONG else []),
            ):
                then, now = (median(getattr(sample, figure) for sample in part) for part in (early, late))
                name = f"{figure.replace('_bytes', ' MB')}: median of the second and the last quarter of {seconds:g} s"
                yield Row(
                    name, f"+ {slack / unit:g} at most", f"{then / unit:.1f}, {now / unit:.1f}", now <= then + slack
                )
            yield from self._ending(None)

    def _send(self, seconds: float, rate: int = ARRIVALS) -> Outcome:
        sending = Sending(self._cores, self._relay, seconds, rate, keep_alive=not rate)
        outcome = sending.outcome()
        self._accepted.append(sending.numbers)
        self._note_memory()
        return outcome

    @contextmanager
    def _sending(self, *, mixed: bool = False) -> Iterator[None]:
        sending = Sending(self._cores, self._relay, _ENDLESS, ARRIVALS, mixed=mixed)
        try:
            yield
        finally:
            sending.stop()
        self._meanwhile.append(sending.outcome())
        self._accepted.append(sending.numbers)
        self._note_memory()

    def _note_memory(self) -> None:
        self._memory = max(self._memory, self._relay.peak_resident_bytes)

    def _sample(self) -> Sample:
        with closing(sqlite3.connect(f"file:{self._relay.spool_path}?mode=ro", uri=True)) as spool:
            rows, passing_rows = (
                sum(spool.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names)
                for names in (_TABLES, _PASSING_TABLES)
            )
        relay = self._relay
        return Sample(relay.resident_bytes, relay.handles, relay.spool_bytes, rows, passing_rows)

    def _ending(self, peak: int | None) -> Iterator[Row]:
        relay = self._relay
        relay.settle()
        if peak is not None:
            deadline = time.monotonic() + _GIVEN_BACK_SECONDS
            limit = max(peak // 10, _SMALL_BYTES)
            if (size := relay.spool_bytes) > limit:
                with self._sending():
                    while (size := relay.spool_bytes) > limit and time.monotonic() < deadline:
                        time.sleep(0.2)
                relay.settle()
            yield Row(
                "size of the spool once it is drained",
                f"<= {limit / 1e6:.0f} MB",
                f"{size / 1e6:.0f} of {peak / 1e6:.0f} MB",
                size <= limit,
            )
            worst, p99 = (max(getattr(it, name) for it in self._meanwhile) for name in ("worst", "p99"))
            yield Row(
                f"accept latency, {ARRIVALS:,}/s, during the catch-up until the file is given back: the longest",
                f"<= {SENDER_PATIENCE:g} s",
                f"{worst:.2f} s; p99 {p99:.2f} s",
                worst <= SENDER_PATIENCE,
            )
        yield Row(
            "resident memory, at most",
            f"<= {_MEMORY_LIMIT / 1e6:.0f} MB",
            f"{self._memory / 1e6:.0f} MB",
            self._memory <= _MEMORY_LIMIT,
        )
        found = landed(self._kafka.bootstrap_servers, self._topic, self._accepted)
        yield Row(
            f"{sum(map(len, self._accepted)):,} events accepted",
            "each published once, in order",
            ", ".join(f"{count:,} {fault}" for fault, count in found._asdict().items()),
            not any(found),
        )


def _latency(when: str, outcomes: list[Outcome], *others: list[Outcome]) -> Iterator[Row]:
    for name in ("p50", "p99"):
        now, before, after = ([getattr(it, name) * 1e3 for it in slices] for slices in (outcomes, *others))
        ratio = median(now) / median(before)
        yield Row(
            f"accept latency {name}, {ARRIVALS:,}/s, {when}",
            "<= 1.2 x before",
            f"{ratio:.2f} x: {spread(now, 1)} / {spread(before, 1)} ms; {spread(after, 1)} ms after",
            ratio <= 1.2,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description="Long runs.")
    parser.add_argument("--outage", type=float, default=10, help="minutes without Kafka (default: %(default)s)")
    parser.add_argument("--backlog", type=int, default=1_000_000, help="events to restart with (default: %(default)s)")
    parser.add_argument("--steady", type=float, default=30, help="minutes of steady load (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where the spools are: a real disk (default: %(default)s)"
    )
    arguments = parser.parse_args()
    cores, load = Cores(), os.getloadavg()[0]
    with console_progress("Kafka") as on_progress:
        runtime = prepare_runtime(on_progress)
    os.sched_setaffinity(0, cores.kafka)  # Kafka inherits it.
    rows: list[Row] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="relay-soak-", dir=arguments.dir) as directory,
            LocalKafka(runtime=runtime) as kafka,
        ):
            place = Path(directory)
            for run in (
                *([Soak("outage", kafka, cores, place).outage(arguments.outage * 60)] if arguments.outage else []),
                *([Soak("backlog", kafka, cores, place).backlog(arguments.backlog)] if arguments.backlog else []),
                *([Soak("steady", kafka, cores, place).steady(arguments.steady * 60)] if arguments.steady else []),
            ):
                for row in run:
                    _say(f"{row.figure}: {row.measured}")
                    rows.append(row)
    except BenchError as failure:
        print(f"soak: {failure}", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n", *machine("tests.bench.soak", cores, arguments.dir, load), sep="\n")
    return 0 if all(row.met for row in rows) else 1


def _memory(relay: Relay) -> str:
    return f"{relay.resident_bytes / 1e6:.0f} MB of memory"


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
