"""`relay dead replay`: the dead letters of the topic, judged again."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import orjson

from relay.config import Settings
from relay.errors import Fenced, KafkaLost
from relay.operate.replayer import MEANINGS, Left, OnProgress, Replay

SUMMARY = "judge the dead letters of the topic again and publish those that are valid now, once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `relay dead replay`."""
    parser.add_argument("--dry-run", action="store_true", help="change nothing: say what would be replayed")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.epilog = (
        "Reads the RELAY_* settings that the relay has; needs no token. Events are published with their ce_id, key, "
        "relay_sequence and relay_received_at, a chat's in the order in which they became dead letters, behind what it "
        "has sent meanwhile. A mark on the dead-letter topic (header relay_replayed) says of one that it was replayed: "
        "run it as often as you like, also after it was killed."
    )


async def run(arguments: argparse.Namespace) -> int:
    """Replays. Raises: SettingsInvalid."""
    # A replay takes no deliveries: it must not ask for a token.
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true", **os.environ})
    # Its errors are told once, in the relay's words.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    with _progress() as on_progress:
        replay = Replay(settings, on_progress)
        error: str | None = None
        try:
            await replay.run(dry=arguments.dry_run)
        except Fenced:
            error = "Another `relay dead replay` of this topic has begun; it goes on where this one was."
        except KafkaLost as lost:
            error = f"{lost} Run it again: what was replayed is marked." if replay.replayed else str(lost)
    if arguments.json:
        told = {
            "topic": settings.dead_letter_topic,
            "dry_run": arguments.dry_run,
            "read": replay.read,
            "replayed": replay.replayed,
            "replayed_before": replay.before,
            "left": {reason.value: replay.left[reason] for reason in Left},
            "error": error,
        }
        print(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
    else:
        print(_told(replay, settings.dead_letter_topic, dry=arguments.dry_run))
    if error:
        print(f"relay: {error}", file=sys.stderr)
    return 0 if replay.complete and not error else 1


def _told(replay: Replay, topic: str, *, dry: bool) -> str:
    lines = [
        f"{replay.read:>9,} dead letters read on {topic}",
        f"{replay.replayed:>9,} {'would be replayed' if dry else 'replayed'}",
    ]
    if replay.before:
        lines.append(f"{replay.before:>9,} replayed before")
    lines += [f"{replay.left[it]:>9,} left, {it}: {MEANINGS[it]}" for it in Left if replay.left[it]]
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.progress import Progress  # noqa: PLC0415

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Dead letters", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
