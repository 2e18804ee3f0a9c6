import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from relay.operate.screen import Screen, duration, size, unreachable
from relay.operate.vitals import Count, Kafka, Latency, Registry, Spool, Vitals

URL = "http://localhost:8081"
QUIET = Vitals(
    version="1.2.3",
    uptime_seconds=3725,
    draining=False,
    unready=None,
    interval_seconds=2,
    traffic={
        name: Count(12_345, 300.25) for name in ("accepted", "duplicate", "rejected", "published", "dead_lettered")
    },
    latency_seconds={name: Latency(0.0123, 1.5, 5) for name in ("accept", "spool_commit", "publish", "end_to_end")},
    spool=Spool(7, 256 << 20, 1 << 30, 0.25, 0, None),
    kafka=Kafka(connected=True, error=None, publish_errors={}, producer_restarts=Count(0, 0.0)),
    registry=Registry(configured=False, connected=False, errors={}),
    rejected={},
    dead_letters={},
    invalid={},
    tokens={"default/1": Count(12_345, 300.25), "default/2": Count(0, 0.0)},
)
TROUBLED = replace(
    QUIET,
    unready="The spool is full.",
    latency_seconds={**QUIET.latency_seconds, "accept": Latency(None, 5, 5)},
    spool=Spool(4_000, 1020 << 20, 1 << 30, 7300, 3, 90),
    kafka=Kafka(
        connected=False,
        error="No broker answers.",
        publish_errors={"unreachable": Count(12, 0.5)},
        producer_restarts=Count(1, 0.0),
    ),
    registry=Registry(configured=True, connected=False, errors={"a-subject": "It is not compatible."}),
    rejected={"bad_token": Count(7, 1.5), "spool_full": Count(5, 0.0)},
    dead_letters={"schema": Count(2, 0.0)},
    invalid={"Message": Count(9, 0.0)},
)


def shown(vitals: Vitals, *, width: int = 80, encoding: str = "utf-8", colours: bool = False) -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding, newline="")
    console = Console(file=file, width=width, force_terminal=colours, color_system="standard" if colours else None)
    console.print(Screen(URL, vitals))
    file.flush()
    return written.getvalue().decode(encoding)


def titles(text: str) -> list[str]:
    """What stands at the left of each line below the first."""
    return [line[:14].strip() for line in text.strip().splitlines()[1:] if line[:14].strip()]


def test_a_relay_that_works_is_shown_with_all_that_it_does() -> None:
    assert [line.rstrip() for line in shown(QUIET).splitlines()] == [
        "relay 1.2.3  http://localhost:8081  up 1 h 2 min  ready",
        "",
        "Events        per s   total        Latency           p50    p99",
        "accepted      300.2  12,345        accept        12.3 ms  1.5 s",
        "retries       300.2  12,345        spool commit  12.3 ms  1.5 s",
        "rejected      300.2  12,345        publish       12.3 ms  1.5 s",
        "published     300.2  12,345        end to end    12.3 ms  1.5 s",
        "dead letters  300.2  12,345",
        "",
        "Spool         ██████░░░░░░░░░░░░░░░░░░░░  25.0% of 1.0 GiB",
        "              7 waiting, oldest 0.2 s, 0 dead",
        "Kafka         connected, 0 producer restarts",
        "Registry      none",
        "Rejects       none",
        "Dead letters  none",
        "Tokens        default/1 12,345 (300.2/s)",
    ]


def test_the_captures_in_the_documentation_have_the_same_lines() -> None:
    page = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    captures = [block for block in page.split("```") if block.startswith("\nrelay ")]
    assert len(captures) == 2
    for capture in captures:
        assert titles(capture) == titles(shown(QUIET))


def test_what_is_wrong_is_said() -> None:
    text = shown(TROUBLED)
    for said in (
        "NOT READY: The spool is full.",
        "accept              -  > 5 s",
        "99.6% of 1.0 GiB",
        "4,000 waiting, oldest 2 h 1 min, 3 dead\n              full in 1 min 30 s at this rate",
        "NOT CONNECTED, 1 producer restart\n",
        "No broker answers.",
        "errors: unreachable 12 (0.5/s)",
        "a-subject: It is not compatible.",
        "bad_token 7 (1.5/s), spool_full 5 (0.0/s)",
        "schema 2 (0.0/s)",
        "Message 9 (0.0/s)",
    ):
        assert said in re.sub(r" +\n", "\n", text)


@pytest.mark.parametrize("width", [30, 40, 71, 72, 200])
def test_it_fits_terminals_of_any_width(width: int) -> None:
    lines = shown(TROUBLED, width=width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    for said in ("accepted 300.2 12,345", "end to end 12.3 ms 1.5 s", "NOT CONNECTED", "schema 2"):
        assert said in words


def test_the_usual_view_fits_an_old_terminal() -> None:
    assert len(shown(QUIET, width=80).splitlines()) <= 24


def test_a_terminal_without_unicode_gets_a_bar_all_the_same() -> None:
    assert "######....................  25.0%" in shown(QUIET, encoding="ascii")


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31mNOT CONNECTED" in shown(TROUBLED, colours=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\d", shown(TROUBLED, colours=True))


def test_a_relay_without_a_spool_has_no_bar() -> None:
    text = shown(replace(QUIET, spool=replace(QUIET.spool, capacity_bytes=0)))
    assert "none (RELAY_ACK=kafka)" in text
    assert "%" not in text


def test_a_relay_that_stops_says_so() -> None:
    assert "stopping" in shown(replace(QUIET, draining=True, unready="draining")).splitlines()[0]


def test_before_the_second_look_there_are_no_rates() -> None:
    traffic = {name: Count(5, None) for name in QUIET.traffic}
    assert re.search(r"accepted +- +5 ", shown(replace(QUIET, traffic=traffic)))


def test_how_long_no_relay_has_answered_is_said() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as said:
        console.print(unreachable("No relay answers.", 75))
    assert said.get() == "No relay answers.\nFor 1 min 15 s; asking again.\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.96, "10.0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (90_000, "1 d 1 h"),
        (1e9, "11574 d 1 h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text
