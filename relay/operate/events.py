"""Where the operators' commands find the spool, and how they show what is in it."""

import argparse
import base64
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from relay.config import Settings
from relay.errors import SpoolMissing
from relay.event import Event
from relay.record import rfc3339

_PRIVATE = 0o600


def add_path(parser: argparse.ArgumentParser) -> None:
    """Declares the option that names the spool."""
    parser.add_argument("--path", type=Path, metavar="FILE", help="the spool's file; else what RELAY_SPOOL_PATH says")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declares the option that names the file of an export."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="a file that is made, for its owner alone to read")
    parser.epilog = (
        "JSON Lines, in order of sequence. `body` is the body as text; in its place `body_base64` if it is no UTF-8. "
        "A body that RELAY_REDACT names fields of is as it was stored: redacted."
    )


def found(arguments: argparse.Namespace) -> tuple[Path, int | None]:
    """
    The spool's file, and its limit in bytes if the settings are asked for both.

    Raises: SettingsInvalid; SpoolMissing if the relay has none by its settings.
    """
    if arguments.path is not None:
        return arguments.path, None
    # Looking takes no deliveries: it must not ask for a token.
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true", **os.environ})
    if settings.ack == "kafka":
        raise SpoolMissing(
            "There is no spool: with RELAY_ACK=kafka no event is kept, and none is answered 200 before Kafka has it. "
            "--path FILE looks into a spool from before."
        )
    return settings.spool_path, settings.spool_max_bytes


def line(sequence: int, at: int, event: Event, size: int) -> str:
    """An event on one line: sequence, time (milliseconds since the epoch), workspace, type, chat, size of its body."""
    key = "-" if event.key is None else event.key
    return printable(f"{sequence:>10}  {timestamp(at)}  {event.workspace}  {event.type:<24}  {key:<24}  {size:>8} B")


def printable(text: str) -> str:
    """*text* without what a terminal would obey: it may be a stranger's."""
    return "".join(character if character.isprintable() else "?" for character in text)


def as_json(sequence: int, event: Event, size: int) -> dict[str, Any]:
    """What there is to say of an event, but for its body."""
    return {
        "sequence": sequence,
        "id": event.id,
        "workspace": event.workspace,
        "type": event.type,
        "key": event.key,
        "received_at": timestamp(event.received_at),
        "time": event.time or None,
        "reason": event.reason,
        "detail": event.detail,
        "schema": event.schema or None,
        "size": size,
    }


def body_as_json(body: bytes) -> dict[str, str]:
    """A body, so that it can be had back byte for byte."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}


def timestamp(milliseconds: int) -> str:
    """That time since the epoch, as RFC 3339 has it."""
    return rfc3339(milliseconds).decode()


def print_json_lines(values: Iterable[Mapping[str, Any]], output: Path | None = None) -> None:
    """Prints one JSON object a line, to *output* if one is given. Raises: OSError, also if *output* exists."""
    with _opened(output) as stream:
        for value in values:
            stream.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
        stream.flush()


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        return
    with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _PRIVATE), "wb") as stream:
        yield stream
