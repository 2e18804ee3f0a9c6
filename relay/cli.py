"""
The command `relay`: one parser and one function per verb.

Modules that a verb alone needs are imported by it: `relay serve` starts in a fraction of a second.
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib import import_module
from typing import Any, Protocol

import orjson

from relay import __version__
from relay.errors import RelayError, SettingsInvalid

DONE, FAILED, WRONG = 0, 1, 2

_DESCRIPTION = """\
Takes Rocket.Chat Omnichannel webhooks and puts them on Kafka: durable before 200, exactly once, in order per chat.

Settings are environment variables, RELAY_*: `relay config` prints them.

Begin with `relay dev --play`: a local Kafka, a relay, and a whole chat sent through both.
"""
_EPILOG = """\
`relay COMMAND --help` says more of each. Exit codes: 0 done, 1 failed, 2 wrong usage or settings.
"""

_COMPLETION = "completion"

#: Verbs with a module of their own, which has `add_arguments` and `run`.
_MODULES = {
    "dev": "relay.dev.up",
    "send": "relay.dev.send",
    "tail": "relay.dev.tail",
    "spool": "relay.operate.spool",
    "dead": "relay.operate.dead",
    "top": "relay.operate.top",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 done, 1 failed, 2 wrong usage or settings."""
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser(given[0] if given else "").parse_args(given)
    try:
        outcome: int | Coroutine[Any, Any, int] = arguments.run(arguments)
        return outcome if isinstance(outcome, int) else _finish(outcome)
    except SettingsInvalid as error:
        for problem in error.problems:
            print(f"relay: {problem}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # Who read it has seen enough; nobody would see a complaint, now or when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (RelayError, OSError) as error:
        print(f"relay: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return FAILED


def _finish(running: Coroutine[Any, Any, int]) -> int:
    import uvloop  # noqa: PLC0415

    return uvloop.run(running)


class _Help(argparse.HelpFormatter):
    """Wraps paragraphs, but not those with examples, which are indented."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(it if "\n  " in it else fill(it, width, indent) for it in paragraphs)


def _parser(chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relay", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"relay {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(
        name: str, summary: str, run: Callable[[argparse.Namespace], int] | None = None
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = verbs.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", formatter_class=_Help
        )
        if run is not None:
            added.set_defaults(run=run)
        elif chosen in {name, _COMPLETION}:  # Imported only then: what tries things out is no part of a serving relay.
            module = import_module(_MODULES[name])
            module.add_arguments(added)
            added.set_defaults(run=module.run)
        return added

    verb("serve", "take deliveries in and publish them, until SIGTERM", _serve).epilog = (
        "SIGTERM or Ctrl-C waits RELAY_DRAIN_SECONDS for the spool to reach Kafka; a second one does not wait.\n\n"
        "Example:\n  RELAY_TOKEN_FILE=token RELAY_KAFKA_BOOTSTRAP_SERVERS=kafka:9092 relay serve"
    )
    verb("dev", "try it out: a local Kafka, a relay, and every record as it lands")
    verb("send", "play Rocket.Chat: its headers, timeout and retries")
    verb("tail", "print records as they land")
    verb("spool", "what waits for Kafka: status, list, export")
    verb("dead", "events that Kafka refused: list, show, export, requeue; dead letters of the topic: replay")
    verb("top", "watch a running relay: rates, latencies, spool, Kafka")
    verb(
        "check", "would it work? settings, spool, registry, Kafka, topics, rights: each line ok or what to do", _check
    ).epilog = "Reads the RELAY_* settings; changes nothing, and works beside a running relay."
    schemas = verb("schemas", "the schemas of the events, and the schema registry", _schemas)
    schemas.add_argument(
        "action",
        choices=["list", "check", "register"],
        help="list: their subjects; check: would the registry accept them? changes nothing; register: give them to it",
    )
    schemas.epilog = (
        "Reads the RELAY_* settings of the registry, topics and workspaces; needs no token.\n\n"
        "Example:\n  RELAY_SCHEMA_REGISTRY_URL=http://registry:8081 relay schemas check"
    )
    verb("config", "print the settings in force, secrets masked", _config)
    for name in ("check", "schemas", "config"):
        verbs.choices[name].add_argument("--json", action="store_true", help="for programs")
    token = verb("token", "make a strong secret token", _token)
    token.add_argument(
        "new", choices=["new"], help="print a new one, for RELAY_TOKEN and Rocket.Chat's webhook settings"
    )
    token.epilog = "Example:\n  relay token new > token"
    completion = verb(_COMPLETION, "print what completes this command line in a shell", _completion)
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    completion.epilog = (
        "To have it in every new shell:\n"
        "  echo 'eval \"$(relay completion bash)\"' >> ~/.bashrc\n"
        "  echo 'eval \"$(relay completion zsh)\"' >> ~/.zshrc    # below its compinit\n"
        "  echo 'relay completion fish | source' >> ~/.config/fish/config.fish"
    )
    return parser


def _serve(_: argparse.Namespace) -> int:
    # Until the service listens for it: the first process of a container ignores what it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(DONE))
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


def _check(arguments: argparse.Namespace) -> int:
    from relay import check  # noqa: PLC0415
    from relay.config import Settings  # noqa: PLC0415

    # A finding says what aiokafka would log.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    findings = asyncio.run(check.check(Settings.read(os.environ)))
    if arguments.json:
        _print_json([finding._asdict() for finding in findings])
    for finding in () if arguments.json else findings:
        _print_finding(finding)
    return DONE if all(finding.ok for finding in findings) else FAILED


def _schemas(arguments: argparse.Namespace) -> int:
    from relay import subjects  # noqa: PLC0415
    from relay.config import Settings  # noqa: PLC0415

    # Takes no deliveries: it must not ask for a token.
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true", **os.environ})
    if arguments.action == "list":
        schemas = subjects.listed(settings)
        if arguments.json:
            _print_json([schema._asdict() for schema in schemas])
        for schema in () if arguments.json else schemas:
            print(f"{schema.type:<24}  {schema.file:<25}  {', '.join(schema.subjects)}")
        return DONE

    async def ask() -> int:
        outcomes = []
        async for outcome in (subjects.checked if arguments.action == "check" else subjects.registered)(settings):
            outcomes.append(outcome)
            if not arguments.json:
                _print_finding(outcome)
        if arguments.json:
            _print_json([outcome.as_json() for outcome in outcomes])
        return DONE if all(outcome.ok for outcome in outcomes) else FAILED

    return asyncio.run(ask())


class _Finding(Protocol):
    """check.Finding, subjects.Outcome."""

    @property
    def ok(self) -> bool: ...
    @property
    def subject(self) -> str: ...
    @property
    def text(self) -> str: ...


def _print_finding(finding: _Finding) -> None:
    print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject}: {finding.text}")


def _print_json(value: object) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _config(arguments: argparse.Namespace) -> int:
    from relay.config import Settings  # noqa: PLC0415

    effective = Settings.read(os.environ).effective()
    if arguments.json:
        _print_json(effective)
    else:
        for name, value in effective.items():
            print(f"{name}={value}")
    return DONE


def _completion(arguments: argparse.Namespace) -> int:
    from relay import completion  # noqa: PLC0415

    print(completion.script(_parser(_COMPLETION), arguments.shell))
    return DONE


def _token(_: argparse.Namespace) -> int:
    print(secrets.token_urlsafe(32))
    return DONE
