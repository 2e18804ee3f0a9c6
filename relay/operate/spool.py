"""`relay spool`: what waits for Kafka, whether or not a relay runs."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import orjson

from relay.inspection import Inspection
from relay.operate.events import (
    add_output,
    add_path,
    as_json,
    body_as_json,
    found,
    line,
    print_json_lines,
    timestamp,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions of `relay spool`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, act, summary in (
        ("status", _status, "how much there is, how old it is, how much room is left"),
        ("list", _list, "the events that wait for Kafka, a line each"),
        ("export", _export, "the events that wait for Kafka, with their bodies"),
    ):
        action = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        action.set_defaults(act=act)
        add_path(action)
    for name in ("status", "list"):
        actions.choices[name].add_argument("--json", action="store_true", help="for programs")
    actions.choices["list"].add_argument(
        "--limit", type=int, default=100, metavar="N", help="at most so many (%(default)d); 0: all"
    )
    add_output(actions.choices["export"])


def run(arguments: argparse.Namespace) -> int:
    """Does what was chosen. Raises: SettingsInvalid, SpoolMissing, SpoolUnusable."""
    path, capacity = found(arguments)
    with closing(Inspection(path)) as spool:
        arguments.act(arguments, spool, capacity)
    return 0


def _status(arguments: argparse.Namespace, spool: Inspection, capacity: int | None) -> None:
    overview = spool.overview()
    progress = overview.progress
    oldest = progress.oldest_received_at
    age = None if oldest is None else max(0.0, round(time.time() - oldest / 1000, 3))
    if arguments.json:
        status = {
            "identity": overview.identity,
            "format": overview.format,
            "events": progress.pending_events,
            "oldest_received_at": None if oldest is None else timestamp(oldest),
            "oldest_event_age_seconds": age,
            "bytes": overview.used_bytes,
            "capacity_bytes": capacity,
            "last_sequence": progress.last_sequence,
            "published_sequence": progress.published,
            "dead_events": overview.dead_events,
            "requeue_requests": overview.requests,
        }
        print(orjson.dumps(status, option=orjson.OPT_INDENT_2).decode())
        return
    since = "" if oldest is None else f", the oldest since {timestamp(oldest)} ({age:.0f} s)"
    room = "" if capacity is None else f" of {capacity:,} ({overview.used_bytes / capacity:.0%})"
    requests = f", {overview.requests} of them to be requeued" if overview.requests else ""
    print(f"identity   {overview.identity} (format {overview.format})")
    print(f"waiting    {progress.pending_events:,} events{since}")
    print(f"published  up to sequence {progress.published} of {progress.last_sequence}")
    print(f"dead       {overview.dead_events:,} events{requests}")
    print(f"bytes      {overview.used_bytes:,}{room}")


def _list(arguments: argparse.Namespace, spool: Inspection, _: int | None) -> None:
    shown = 0
    for sequence, event, size in islice(spool.waiting(bodies=False), arguments.limit or None):
        if arguments.json:
            print(orjson.dumps(as_json(sequence, event, size)).decode())
        else:
            print(line(sequence, event.received_at, event, size))
        shown += 1
    more = spool.overview().progress.pending_events - shown
    if shown == arguments.limit and more > 0:
        print(f"... and {more:,} more: --limit 0 lists all", file=sys.stderr)


def _export(arguments: argparse.Namespace, spool: Inspection, _: int | None) -> None:
    def exported() -> Iterator[dict[str, Any]]:
        for sequence, event, size in spool.waiting(bodies=True):
            yield as_json(sequence, event, size) | body_as_json(event.body)

    print_json_lines(exported(), arguments.output)
