"""
The command `relay`: one parser and one function per verb.

Modules that a verb alone needs are imported by it: `relay serve` starts in a fraction of a second.
"""

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import orjson

from relay import __version__
from relay.errors import RelayError, SettingsInvalid

DONE, FAILED, WRONG = 0, 1, 2

_DESCRIPTION = """\
Takes Rocket.Chat Omnichannel webhooks and puts them on Kafka: durable before 200, exactly once, in order per chat.

Settings are environment variables, RELAY_*: `relay config` prints them.
Begin with `relay dev --play`: a local Kafka, a relay, and a whole chat sent through both.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 failed, 2 wrong usage or settings."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except SettingsInvalid as error:
        for problem in error.problems:
            print(f"relay: {problem}", file=sys.stderr)
        return WRONG
    except (RelayError, OSError) as error:
        print(f"relay: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"relay {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    verb = _add(verbs, "serve", _serve, "take deliveries in and publish them, until SIGTERM")
    verb.epilog = (
        "SIGTERM or Ctrl-C waits RELAY_DRAIN_SECONDS for the spool to reach Kafka; a second one does not wait."
    )

    verb = _add(verbs, "dev", _dev, "try it out: a local Kafka, a relay, and every record as it lands")
    verb.add_argument("--play", action="store_true", help="send a whole chat first")
    verb.add_argument("--once", action="store_true", help="stop when the chat of --play has landed")
    verb.add_argument("--port", type=int, default=8080, help="webhook port (default: %(default)s)")
    verb.add_argument("--data", metavar="DIR", help="keep Kafka's data and the spool in DIR; else they are thrown away")
    verb.epilog = "The first start fetches Kafka (about 60 MB) from Maven Central; later ones need no network."

    verb = _add(verbs, "check", _check, "would it work? settings, Kafka, topics: each line ok or what to do")
    verb.add_argument("--json", action="store_true", help="for programs")

    verb = _add(verbs, "config", _config, "print the settings in force, secrets masked")
    verb.add_argument("--json", action="store_true", help="for programs")

    from relay.dev import send, tail  # noqa: PLC0415 - only the parser of every verb is needed

    send.add_arguments(
        _add(verbs, "send", _asynchronous(send.run), "play Rocket.Chat: its headers, timeout and retries")
    )
    tail.add_arguments(_add(verbs, "tail", _asynchronous(tail.run), "print records as they land"))

    verb = _add(verbs, "token", _token, "make a strong secret token")
    verb.add_argument(
        "new", choices=["new"], help="print a new token, for RELAY_TOKEN and Rocket.Chat's webhook settings"
    )
    return parser


def _add(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(run=run)
    return parser


def _asynchronous(
    run: Callable[[argparse.Namespace], Coroutine[Any, Any, int]],
) -> Callable[[argparse.Namespace], int]:
    def synchronous(arguments: argparse.Namespace) -> int:
        import uvloop  # noqa: PLC0415

        return uvloop.run(run(arguments))

    return synchronous


def _serve(_: argparse.Namespace) -> int:
    import uvloop  # noqa: PLC0415

    from relay import logs  # noqa: PLC0415
    from relay.config import Settings  # noqa: PLC0415
    from relay.service import Service  # noqa: PLC0415

    settings = Settings.read(os.environ)
    logs.configure(settings.log_level, settings.log_format)

    async def serve() -> None:
        await Service(settings).run()

    uvloop.run(serve())
    return DONE


def _dev(arguments: argparse.Namespace) -> int:
    from relay.dev import up  # noqa: PLC0415

    return asyncio.run(up.run(arguments))


def _check(arguments: argparse.Namespace) -> int:
    from relay import check  # noqa: PLC0415
    from relay.config import Settings  # noqa: PLC0415

    findings = asyncio.run(check.check(Settings.read(os.environ)))
    if arguments.json:
        print(orjson.dumps([finding._asdict() for finding in findings], option=orjson.OPT_INDENT_2).decode())
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject}: {finding.text}")
    return DONE if all(finding.ok for finding in findings) else FAILED


def _config(arguments: argparse.Namespace) -> int:
    from relay.config import Settings  # noqa: PLC0415

    effective = Settings.read(os.environ).effective()
    if arguments.json:
        print(orjson.dumps(effective, option=orjson.OPT_INDENT_2).decode())
    else:
        for name, value in effective.items():
            print(f"{name}={value}")
    return DONE


def _token(_: argparse.Namespace) -> int:
    print(secrets.token_urlsafe(32))
    return DONE
