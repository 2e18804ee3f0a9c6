"""`relay top`: a running relay, live, from its admin port."""

import argparse
import dataclasses
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import urlsplit

import orjson
from rich.console import Console, RenderableType
from rich.live import Live

from relay.config import Settings
from relay.errors import AdminUnreachable
from relay.operate.scrape import Scrape, scrape
from relay.operate.screen import Screen, unreachable
from relay.operate.vitals import Vitals, same_run, vitals

#: Seconds of looks that are kept: the spool's file grows in steps, too large for the rate of a short interval.
_MEMORY_SECONDS = 60.0
_SHORTEST = 0.1
_ANYWHERE = ("0.0.0.0", "::", "")  # noqa: S104


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `relay top`."""
    parser.add_argument(
        "--url", type=_url, help="the relay's admin port (http://localhost:8081, or as RELAY_ADMIN_PORT says)"
    )
    parser.add_argument(
        "--interval", type=_interval, default=2.0, metavar="S", help="seconds between two looks: %(default)g"
    )
    parser.add_argument(
        "--once", action="store_true", help="print one view, of one interval; so it is without a terminal"
    )
    parser.add_argument("--json", action="store_true", help="with --once: for programs; latencies and ages in seconds")
    parser.epilog = (
        "Rates and latencies are those of the last interval, totals since the relay's start. Ctrl-C ends.\n\n"
        "Examples:\n"
        "  relay top\n"
        "  relay top --once --json | jq .spool\n"
        "  kubectl exec -it POD -c relay -- relay top"
    )


def run(arguments: argparse.Namespace) -> int:
    """Shows the relay until Ctrl-C, or once. Raises: AdminUnreachable if it is to be shown once."""
    url = arguments.url or _own_url()
    console = Console(highlight=False)
    try:
        if arguments.once or arguments.json or not console.is_terminal:
            seen = _once(url, arguments.interval)
            if arguments.json:
                print(orjson.dumps(dataclasses.asdict(seen), option=orjson.OPT_INDENT_2).decode())
            else:
                console.print(Screen(url, seen))
        else:
            with _shown(console) as show:
                _follow(url, arguments.interval, show)
    except KeyboardInterrupt:
        pass  # This is how it ends.
    return 0


def _once(url: str, interval: float) -> Vitals:
    first = scrape(url)
    time.sleep(interval)
    second = scrape(url)
    return vitals([first, second] if same_run(first, second) else [second])


class _Show(Protocol):
    def __call__(self, view: RenderableType) -> None: ...


def _follow(url: str, interval: float, show: _Show) -> None:
    looks: deque[Scrape] = deque(maxlen=max(2, math.ceil(_MEMORY_SECONDS / interval)))
    away_since: float | None = None
    while True:
        began = time.monotonic()
        try:
            look = scrape(url)
        except AdminUnreachable as error:
            looks.clear()
            away_since = away_since if away_since is not None else began
            show(unreachable(str(error), began - away_since))
        else:
            away_since = None
            if looks and not same_run(looks[-1], look):
                looks.clear()
            looks.append(look)
            show(Screen(url, vitals(looks)))
        time.sleep(max(0.0, began + interval - time.monotonic()))


@contextmanager
def _shown(console: Console) -> Iterator[_Show]:
    if console.is_dumb_terminal:  # It cannot go back up: one view below the other.
        yield lambda view: console.print(view, "")
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda view: live.update(view, refresh=True)


def _own_url() -> str:
    # Where the relay of this environment listens, whatever else is wrong with its settings.
    given = {name: value for name, value in os.environ.items() if name.startswith("RELAY_ADMIN_")}
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true", **given})
    host = "localhost" if settings.admin_host in _ANYWHERE else settings.admin_host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.admin_port}"


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text} is no URL such as http://localhost:8081")
    return text.rstrip("/")


def _interval(text: str) -> float:
    seconds = float(text)
    if not _SHORTEST <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from {_SHORTEST:g} on")
    return seconds
