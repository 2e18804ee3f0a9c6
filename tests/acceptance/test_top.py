"""`relay top` on the running relay: once for programs, live in a terminal, with the relay gone and back."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from kafka_for_tests import FoundKafka
from relay_process import RelayProcess, run_relay, wait_until
from terminal import Terminal

#: Nobody listens there.
NOWHERE = "127.0.0.1:1"
NORMAL_SCREEN = b"\x1b[?1049l"


@pytest.fixture
def cut_off(tmp_path: Path) -> Iterator[RelayProcess]:
    """Yield a relay whose Kafka is away."""
    relay = RelayProcess(tmp_path / "relay", NOWHERE, {})
    yield relay
    relay.close()


def top(relay: RelayProcess, columns: int = 80, **environ: str) -> Terminal:
    """`relay top` in a terminal of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    inherited.pop("NO_COLOR", None)
    ours = {"RELAY_ADMIN_PORT": str(relay.admin_port), "TERM": "xterm", **environ}
    command = [sys.executable, "-m", "relay", "top", "--interval", "0.2"]
    return Terminal(command, {**inherited, **ours}, columns=columns)


@contextmanager
def deliveries(relay: RelayProcess, body: bytes) -> Iterator[None]:
    """Sends events all the time: *body* with a number in place of its first 0000000."""
    ended = threading.Event()

    def send() -> None:
        for number in range(10_000_000):
            if ended.is_set():
                break
            post(relay.port, body.replace(b"0000000", f"{number:07}".encode(), 1))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def seen_by_a_program(relay: RelayProcess, *options: str) -> dict[str, Any]:
    """What `relay top --once --json` says, with the admin port from the environment."""
    port = {"RELAY_ADMIN_PORT": str(relay.admin_port)}
    ended = run_relay(relay.directory, "top", "--once", "--json", *options, settings=port)
    assert ended.returncode == 0, ended.stderr
    seen: dict[str, Any] = json.loads(ended.stdout)
    return seen


def test_a_program_is_told_what_the_relay_did(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start(connected=True)
    for number in range(3):
        assert post(relay.port, message(new_chat(), number)).status == 200
    assert post(relay.port, b"{}", token="another").status == 401
    relay.wait_until_drained()

    with deliveries(relay, message(new_chat(), text="0000000")):
        seen = seen_by_a_program(relay)

    accepted, rejected = seen["traffic"]["accepted"], seen["traffic"]["rejected"]
    assert accepted["total"] > 3
    assert accepted["per_second"] > 0
    assert rejected == {"total": 1, "per_second": 0.0}
    assert list(seen["rejected"]) == ["bad_token"]
    assert list(seen["tokens"]) == ["default/1"]
    assert seen["kafka"]["connected"] is True
    assert seen["registry"] == {"configured": False, "connected": False, "errors": {}}
    assert 0 < seen["latency_seconds"]["spool_commit"]["p50"] <= seen["latency_seconds"]["end_to_end"]["p99"]
    assert 1.9 < seen["interval_seconds"] < 60


def test_an_outage_shows_with_its_reason_and_the_time_that_is_left(cut_off: RelayProcess) -> None:
    cut_off.settings["RELAY_SPOOL_MAX_BYTES"] = str(1 << 30)
    cut_off.start()
    cut_off.wait_for("kafka_lost")
    assert post(cut_off.port, message(new_chat())).status == 200

    with deliveries(cut_off, message(new_chat(), text="0000000" + "x" * 100_000)):
        seen = seen_by_a_program(cut_off, "--interval", "1")

    assert seen["kafka"]["connected"] is False
    assert seen["kafka"]["error"]
    assert list(seen["kafka"]["publish_errors"]) == ["unreachable"]
    assert seen["spool"]["events"] > 1
    assert seen["spool"]["oldest_event_age_seconds"] > 1
    assert seen["spool"]["capacity_bytes"] == 1 << 30
    assert seen["spool"]["seconds_until_full"] > 0


def test_without_a_terminal_it_is_shown_once(cut_off: RelayProcess) -> None:
    cut_off.start()
    options = ("--url", f"http://127.0.0.1:{cut_off.admin_port}/", "--interval", "0.1")

    # A proxy is for what is far away.
    ended = run_relay(cut_off.directory, "top", *options, settings={"http_proxy": f"http://{NOWHERE}"})

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("NOT CONNECTED") == 1
    assert "\x1b" not in ended.stdout


def test_in_a_terminal_it_follows_the_relay_through_a_restart_until_ctrl_c(cut_off: RelayProcess) -> None:
    cut_off.start()
    with top(cut_off) as live:
        wait_until(lambda: live.shows("NOT CONNECTED"), "the relay is shown")
        assert post(cut_off.port, message(new_chat())).status == 200
        wait_until(lambda: live.shows("1 waiting"), "the event is shown")

        cut_off.kill()
        wait_until(lambda: live.shows("No relay answers"), "its absence is shown")
        cut_off.start()
        wait_until(lambda: live.shows("1 waiting"), "it is shown again")

        live.process.send_signal(signal.SIGINT)
        wait_until(live.ended, "it ends")
        assert live.process.returncode == 0
        live.read()
        assert NORMAL_SCREEN in live.written
        assert b"Traceback" not in live.written


def test_a_relay_that_answers_nothing_any_more_is_noticed(cut_off: RelayProcess) -> None:
    cut_off.start()
    with top(cut_off) as live:
        wait_until(lambda: live.shows("NOT CONNECTED"), "the relay is shown")
        cut_off.freeze()
        wait_until(lambda: live.shows("No relay answers"), "its silence is shown")
        cut_off.thaw()
        wait_until(lambda: live.shows("NOT CONNECTED"), "it is shown again")


@pytest.mark.parametrize(
    ("environ", "unwanted"),
    [({"NO_COLOR": "1"}, rb"\x1b\[[\d;]*3\dm"), ({"TERM": "dumb"}, rb"\x1b")],
    ids=["no colours", "dumb terminal"],
)
def test_terminals_get_only_what_they_take(cut_off: RelayProcess, environ: dict[str, str], unwanted: bytes) -> None:
    cut_off.start()
    with top(cut_off, columns=40, **environ) as live:

        def twice() -> bool:
            live.read()
            return live.written.count(b"NOT CONNECTED") >= 2

        wait_until(twice, "two views")
        assert not re.search(unwanted, live.written)


def test_where_no_relay_is_it_says_so_and_fails(cut_off: RelayProcess) -> None:
    ended = run_relay(cut_off.directory, "top", "--once", "--url", f"http://{NOWHERE}", settings={})
    assert ended.returncode == 1
    assert ended.stderr == f"relay: No relay answers at http://{NOWHERE}: Connection refused.\n"

    cut_off.start()
    ended = run_relay(cut_off.directory, "top", "--once", "--url", f"http://127.0.0.1:{cut_off.port}", settings={})
    assert ended.returncode == 1
    assert "is this the relay's admin port?" in ended.stderr


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        (("--url", "localhost:8081"), {}, "--url"),
        (("--url", "http://localhost:99999"), {}, "--url"),
        (("--interval", "0"), {}, "--interval"),
        (("--interval", "soon"), {}, "--interval"),
        ((), {"RELAY_ADMIN_PORT": "eighty"}, "RELAY_ADMIN_PORT"),
    ],
)
def test_wrong_usage_is_named(tmp_path: Path, options: tuple[str, ...], settings: dict[str, str], named: str) -> None:
    ended = run_relay(tmp_path, "top", "--once", *options, settings=settings)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr
