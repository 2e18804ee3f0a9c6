"""`relay send`: files, a whole made-up chat, or a load, as Rocket.Chat sends them."""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from relay.dev.chats import conversation, stream
from relay.dev.rocketchat import Attempt, RocketChat


@dataclass(slots=True)
class Tally:
    """Counts what a player does: give its `attempt` to the player as *on_attempt*."""

    events: int = 0  # Begun; counted by who calls `deliver`.
    delivered: int = 0
    given_up: int = 0
    attempts: int = 0
    retries: int = 0
    answers: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # From the start of the first try to the end of the last.
    sending: float = 0.0  # The same, of first tries only.
    behind: float = 0.0  # How late, in seconds, the latest event of a stream was sent.
    slowest: float = 0.0
    # Answered tries by 50 times the logarithm of their seconds: steps of 2 %, in bounded memory.
    latencies: Counter[int] = field(default_factory=Counter)
    _began: float | None = None

    def attempt(self, attempt: Attempt) -> None:
        now = time.perf_counter()
        self._began = self._began if self._began is not None else now - attempt.seconds
        self.seconds = now - self._began
        self.attempts += 1
        if attempt.number == 1:
            self.sending = self.seconds
        else:
            self.retries += 1
        self.delivered += attempt.delivered
        self.given_up += not attempt.delivered and attempt.again_in is None
        if attempt.error:
            self.errors[attempt.error] += 1
        if attempt.status is not None:
            self.answers[attempt.status] += 1
            self.latencies[round(50 * math.log(attempt.seconds))] += 1
            self.slowest = max(self.slowest, attempt.seconds)

    def latency(self, share: float) -> float:
        """Seconds within which *share* of the answered tries were answered, to 1 %."""
        wanted = share * self.latencies.total()
        for step in sorted(self.latencies):
            wanted -= self.latencies[step]
            if wanted <= 0:
                return min(math.exp(step / 50), self.slowest)
        return self.slowest

    def as_dict(self) -> dict[str, Any]:
        latency = {"p50": self.latency(0.5), "p99": self.latency(0.99), "max": self.slowest}
        return {
            "events": self.events,
            "delivered": self.delivered,
            "given_up": self.given_up,
            "unfinished": self.events - self.delivered - self.given_up,
            "attempts": self.attempts,
            "retries": self.retries,
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            "errors": dict(sorted(self.errors.items())),
            "latency_ms": {name: round(seconds * 1000, 3) for name, seconds in latency.items()},
            "seconds": round(self.seconds, 3),
            "events_per_second": round(self.events / self.sending, 1) if self.sending else 0.0,
            "behind_seconds": round(self.behind, 3),
        }

    def __str__(self) -> str:
        told = self.as_dict()
        results = ", ".join(f"{count} x {name}" for name, count in {**told["answers"], **told["errors"]}.items())
        lines = [
            f"{self.events} events, {told['events_per_second']}/s",
            f"{self.delivered} delivered, {self.given_up} given up, {told['unfinished']} unfinished",
            f"{self.attempts} tries, {self.retries} of them retries: {results or 'no result yet'}",
        ]
        if self.answers:
            latency = ", ".join(f"{name} {milliseconds} ms" for name, milliseconds in told["latency_ms"].items())
            lines.append(f"answered after {latency}")
        if self.behind > 1:
            lines.append(f"fell up to {self.behind:.1f} s behind: all chats were waiting")
        return "\n".join(lines)


async def play(
    player: RocketChat,
    tally: Tally,
    *,
    chats: int,
    rate: float,
    duration: float | None = None,
    rng: random.Random | None = None,
) -> None:
    """A load of made-up chats: *chats* at a time, *rate* events/s in all (may be infinite), for *duration* seconds.

    Events fall due at a steady pace and go to whichever chat is free; within a chat each event is settled (delivered or
    given up) before the next is made. So a chat that waits for a retry slows nobody; when all wait, the stream falls
    behind, catches up afterwards, and tells so. After *duration* no event begins; retries are waited for.
    """
    rng = rng or random.Random()
    clock = asyncio.get_running_loop().time
    turns = itertools.count()
    start = clock()
    end = start + (math.inf if duration is None else duration)

    async def one_place(bodies: Iterator[tuple[str, bytes]]) -> None:
        while max(due := start + next(turns) / rate, clock()) < end:
            await asyncio.sleep(max(0.0, due - clock()))
            tally.behind = max(tally.behind, clock() - due) if rate < math.inf else 0.0
            tally.events += 1
            await player.deliver(next(bodies)[1])

    with suppress(TimeoutError):
        async with asyncio.timeout_at(end + player.window), asyncio.TaskGroup() as places:
            for _ in range(chats):
                places.create_task(one_place(stream(random.Random(rng.getrandbits(64)))))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Play Rocket.Chat against a relay: its request, timeout and retries. Redirects are not followed and count as "
        "not delivered. Exit code: 0 all delivered, 1 not all, 2 wrong usage."
    )
    what = parser.add_argument_group("what to send (one of)")
    what.add_argument(
        "files", nargs="*", metavar="FILE", help="bodies, sent byte for byte, one after the other; - is stdin"
    )
    what.add_argument("--chat", action="store_true", help="one whole made-up chat, with every type of event a chat has")
    what.add_argument(
        "--chats",
        type=_count,
        metavar="N",
        help="a load of N chats at a time; within a chat one event at a "
        "time, each settled before the next (Rocket.Chat itself does not wait)",
    )
    load = parser.add_argument_group("with --chats")
    load.add_argument("--rate", type=_positive, metavar="R", help="events per second in all (10); inf: all that go")
    load.add_argument("--duration", type=_positive, metavar="S", help="seconds (until Ctrl-C)")
    how = parser.add_argument_group("how")
    how.add_argument("--url", default="http://127.0.0.1:8080/rocketchat", help="%(default)s")
    how.add_argument("--token", help="the secret token (the first of RELAY_TOKEN or RELAY_TOKEN_FILE); '' sends none")
    how.add_argument("--rocketchat", default="9.0", metavar="VERSION", help="whose retry rule: %(default)s")
    how.add_argument(
        "--timeout",
        type=_positive,
        default=5.0,
        metavar="S",
        help="Livechat_http_timeout in seconds: %(default)s; before 6.2 there was none",
    )
    how.add_argument(
        "--gap", type=_positive, metavar="S", help="seconds between two tries (4 x timeout; before 6.2: 10)"
    )
    how.add_argument("--no-retry", action="store_true", help="one try per event")
    how.add_argument("--seed", type=int, help="the same ids and texts again; times are always fresh")
    how.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else")
    parser.epilog = (
        "Examples:\n"
        "  relay send --chat\n"
        "  relay send --chats 64 --rate 500 --duration 60\n"
        "  relay send --no-retry body.json"
    )


async def run(args: argparse.Namespace) -> int:
    """The exit code of `relay send`. Cancelled (Ctrl-C), it prints the summary so far."""
    tally, rng = Tally(), random.Random(args.seed)
    name = ""

    def on_attempt(attempt: Attempt) -> None:
        tally.attempt(attempt)
        if name and not args.json:
            print(_line(name, attempt), flush=True)

    try:
        bodies = _bodies(args, rng)
        player = RocketChat(
            args.url,
            _token(args.token, os.environ),
            version=args.rocketchat,
            timeout=args.timeout,
            gap=args.gap,
            retry=not args.no_retry,
            on_attempt=on_attempt,
        )
    except (ValueError, OSError) as exc:
        reason = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) else exc
        print(f"relay send: {reason}", file=sys.stderr)
        return 2
    try:
        for name, body in bodies:  # noqa: B007 - told by on_attempt.
            tally.events += 1
            await player.deliver(body)
        if args.chats:
            rate = args.rate or 10.0
            with _progress(tally, rate * (args.duration or math.inf)):
                await play(player, tally, chats=args.chats, rate=rate, duration=args.duration, rng=rng)
    except asyncio.CancelledError:
        print("relay send: interrupted", file=sys.stderr)
    print(json.dumps(tally.as_dict()) if args.json else tally)
    return 0 if tally.delivered == tally.events else 1


def _bodies(args: argparse.Namespace, rng: random.Random) -> list[tuple[str, bytes]]:
    chosen = bool(args.files) + args.chat + bool(args.chats)
    if chosen != 1:
        fault = "one thing at a time" if chosen else "nothing to send"
        raise ValueError(f"{fault}: give FILEs, or --chat, or --chats N")
    if not args.chats and (args.rate or args.duration):
        raise ValueError("--rate and --duration go with --chats")
    if args.chat:
        # So long ago that a whole chat fits in before now.
        bodies = conversation(rng, started_at=datetime.now(UTC) - timedelta(minutes=10))
        return [(json.loads(body)["type"], body) for body in bodies]
    return [(file, sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()) for file in args.files]


def _token(given: str | None, environ: Mapping[str, str]) -> str | None:
    if given is None:
        given = environ.get("RELAY_TOKEN")
    if given is None and (file := environ.get("RELAY_TOKEN_FILE")):
        given = Path(file).read_text()
    return next((line.strip() for line in (given or "").splitlines() if line.strip()), None)


def _line(name: str, attempt: Attempt) -> str:
    result = ", ".join(str(part) for part in (attempt.status, attempt.error) if part is not None)
    answer = f" {attempt.answer[:200].decode(errors='replace')!r}" if attempt.answer else ""
    again = (
        "" if attempt.delivered else ", given up" if attempt.again_in is None else f", again in {attempt.again_in:g} s"
    )
    return f"{name}: {result}{answer} after {attempt.seconds * 1000:.1f} ms{again}"


@contextmanager
def _progress(tally: Tally, total: float) -> Iterator[None]:
    """A progress bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it.
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    async def follow() -> None:
        while True:
            text = f"{tally.events} events, {tally.retries} retries, {tally.given_up} given up"
            bar.update(task, completed=tally.events, description=text)
            await asyncio.sleep(0.2)

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total if math.isfinite(total) else None)
        following = asyncio.create_task(follow())
        try:
            yield
        finally:
            following.cancel()


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
