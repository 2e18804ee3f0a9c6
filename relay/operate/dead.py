"""`relay dead`: the events that Kafka refused, to look at, to take away and to publish after all; the dead letters."""

import argparse
import sys
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import orjson

from relay.files import owner
from relay.inspection import Dead, Inspection, request
from relay.operate import replay
from relay.operate.events import (
    add_output,
    add_path,
    as_json,
    body_as_json,
    found,
    line,
    print_json_lines,
    printable,
    timestamp,
)
from relay.operate.requeue import State, watched

Act = Callable[[argparse.Namespace], int | Coroutine[Any, Any, int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions of `relay dead`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, summary: str, act: Act) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = actions.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        added.set_defaults(act=act)
        return added

    list_ = action("list", "the events that Kafka refused, with what it said", _list)
    show = action("show", "one of them, with its body", _show)
    export = action("export", "all of them, with their bodies", _export)
    requeue = action("requeue", "publish them after all, once the cause is gone", _requeue)
    replay.add_arguments(action("replay", replay.SUMMARY, replay.run))
    for reads_the_spool in (list_, show, export, requeue):
        add_path(reads_the_spool)
    for has_json in (list_, show, requeue):
        has_json.add_argument("--json", action="store_true", help="for programs")
    show.add_argument("sequence", type=int, metavar="SEQUENCE", help="its number in `relay dead list`")
    show.add_argument("--body", action="store_true", help="its body alone, byte for byte")
    add_output(export)
    which = requeue.add_mutually_exclusive_group(required=True)
    which.add_argument("sequences", type=int, nargs="*", default=[], metavar="SEQUENCE", help="numbers of `dead list`")
    which.add_argument("--all", action="store_true", help="all there are")
    requeue.add_argument(
        "--wait", type=float, default=10.0, metavar="S", help="seconds to wait for what becomes of them (%(default)g)"
    )
    requeue.epilog = (
        "The relay, or its next start, puts them at the end of the queue: after all that their chats have sent "
        "meanwhile, among themselves in the order of their sequence. They keep their ce_id and get a new "
        "relay_sequence. What Kafka refuses again is dead again."
    )


def run(arguments: argparse.Namespace) -> int | Coroutine[Any, Any, int]:
    """Does what was chosen. Raises: SettingsInvalid, SpoolMissing, SpoolUnusable, DeadMissing."""
    act: Act = arguments.act
    return act(arguments)


def _list(arguments: argparse.Namespace) -> int:
    with closing(_opened(arguments)) as spool:
        for dead in spool.dead(bodies=False):
            if arguments.json:
                print(orjson.dumps(_as_json(dead)).decode())
            else:
                requested = "  (to be requeued)" if dead.requested_at is not None else ""
                print(
                    f"{line(dead.sequence, dead.refused_at, dead.event, dead.size)}  {printable(dead.error)}{requested}"
                )
    return 0


def _show(arguments: argparse.Namespace) -> int:
    with closing(_opened(arguments)) as spool:
        dead = spool.dead_event(arguments.sequence)
    if arguments.body:
        sys.stdout.buffer.write(dead.event.body)
        sys.stdout.buffer.flush()
    elif arguments.json:
        print(orjson.dumps(_as_json(dead) | body_as_json(dead.event.body), option=orjson.OPT_INDENT_2).decode())
    else:
        for name, value in _as_json(dead).items():
            if value is not None:
                print(f"{name:<12}  {printable(str(value))}")
        print()
        print(printable(dead.event.body.decode(errors="replace")))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    with closing(_opened(arguments)) as spool:
        exported = (_as_json(dead) | body_as_json(dead.event.body) for dead in spool.dead(bodies=True))
        print_json_lines(exported, arguments.output)
    return 0


def _requeue(arguments: argparse.Namespace) -> int:
    path, _ = found(arguments)
    with closing(Inspection(path)) as spool:
        before = {dead.sequence: dead.event.id for dead in spool.dead(bodies=False)}
        sequences = request(path, None if arguments.all else arguments.sequences)
        runs = owner(path) is not None
        outcomes = watched(spool, sequences, before, arguments.wait if runs else 0.0)
    if arguments.json:
        print(orjson.dumps([outcome._asdict() for outcome in outcomes], option=orjson.OPT_INDENT_2).decode())
    elif not outcomes:
        print("There are no dead events.")
    for outcome in () if arguments.json else outcomes:
        match outcome.state:
            case State.REQUESTED if runs:
                told = "requested; the relay takes it up as soon as it is announced as dead and the disk has room"
            case State.REQUESTED:
                told = "requested; no relay runs on this spool, the next start takes it up"
            case State.QUEUED:
                told = "in the queue, waits for Kafka"
            case State.PUBLISHED:
                told = "published"
            case State.REFUSED:
                told = f"refused again, dead as {outcome.dead_as}: {printable(outcome.error or '')}"
        print(f"{outcome.sequence}: {told}")
    return 1 if any(outcome.state is State.REFUSED for outcome in outcomes) else 0


def _opened(arguments: argparse.Namespace) -> Inspection:
    return Inspection(found(arguments)[0])


def _as_json(dead: Dead) -> dict[str, Any]:
    return {
        **as_json(dead.sequence, dead.event, dead.size),
        "error": dead.error,
        "refused_at": timestamp(dead.refused_at),
        "requested_at": None if dead.requested_at is None else timestamp(dead.requested_at),
    }
