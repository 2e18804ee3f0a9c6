import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from relay import requeue as requeue_module
from relay import spool as spool_module
from relay.batch import Entry
from relay.cli import main
from relay.event import DeadLetterReason, Event
from relay.metrics import Metrics
from relay.requeue import requeue_what_is_requested
from relay.spool import Spool
from relay.store import Change, Store

MakeEvent = Callable[..., Event]
Until = Callable[[Callable[[], object]], Awaitable[None]]
MAX_BYTES = 1 << 28
#: 2026-11-20T09:00:00.123Z
AT = 1_795_165_200_123


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "relay.db"
    monkeypatch.setenv("RELAY_SPOOL_PATH", str(path))
    return path


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path, MAX_BYTES)) as store:
        yield store


@pytest.fixture
def entries(make_event: MakeEvent) -> list[Entry]:
    """Return a plain event, one that is all but plain, and one without a chat."""
    plain = make_event(1, workspace="acme", received_at=AT)
    odd = make_event(2, chat="z\u00fcrich \x1b[31m", received_at=AT + 1)._replace(
        occurrence=3, time="2026-11-20T09:00:01Z", body=b'{"\x00\xff\x1b[2J'
    )
    keyless = make_event(3, received_at=AT + 2)._replace(
        key=None, reason=DeadLetterReason.NO_KEY, detail="/_id: missing", body='{"\u00e9\\u00e9":1}'.encode()
    )
    return [(7, plain), (8, odd), (9, keyless)]


def body_of(exported: dict[str, Any]) -> bytes:
    if "body_base64" in exported:
        assert "body" not in exported
        return base64.b64decode(exported["body_base64"])
    return str(exported["body"]).encode()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- relay spool ---


def test_status_says_how_much_waits_and_how_much_room_is_left(
    store: Store,
    entries: list[Entry],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
) -> None:
    monkeypatch.setenv("RELAY_SPOOL_MAX_BYTES", "123456789")
    used = store.write(Change(entries, total_events=3, published=7, dead=[(entries[0], "too large")]))

    assert main(["spool", "status", "--json"]) == 0

    status = json.loads(capsys.readouterr().out)
    assert status.pop("oldest_event_age_seconds") >= 0
    assert status == {
        "identity": store.contents(0).identity,
        "format": 2,
        "events": 2,
        "oldest_received_at": "2026-11-20T09:00:00.123Z",
        "bytes": used,
        "capacity_bytes": 123456789,
        "last_sequence": 9,
        "published_sequence": 7,
        "dead_events": 1,
        "requeue_requests": 0,
    }
    assert main(["spool", "status"]) == 0
    shown = capsys.readouterr().out
    for part in (
        status["identity"],
        "2 events",
        "2026-11-20T09:00:00.123Z",
        "sequence 7 of 9",
        "1 events",
        "123,456,789",
    ):
        assert part in shown
    assert main(["spool", "status", "--json", "--path", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["capacity_bytes"] is None


def test_status_of_an_empty_spool(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "status"]) == 0
    assert "0 events\n" in capsys.readouterr().out
    assert main(["spool", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["oldest_received_at"] is None


def test_list_has_a_line_for_each_waiting_event_that_no_terminal_obeys(
    store: Store, entries: list[Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(Change(entries, total_events=3, published=7))
    assert main(["spool", "list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["8", "2026-11-20T09:00:00.124Z", "default", "Message", "z\u00fcrich", "?[31m", "8", "B"]
    assert second.split() == ["9", "2026-11-20T09:00:00.125Z", "default", "Message", "-", "14", "B"]
    assert main(["spool", "list", "--json"]) == 0
    listed = lines(capsys.readouterr().out)
    assert [event["sequence"] for event in listed] == [8, 9]
    assert [event["key"] for event in listed] == ["z\u00fcrich \x1b[31m", None]


@pytest.mark.parametrize(("limit", "listed"), [("2", 2), ("5", 5), ("9", 5), ("0", 5)])
def test_list_says_what_it_left_out(
    store: Store, make_event: MakeEvent, capsys: pytest.CaptureFixture[str], limit: str, listed: int
) -> None:
    store.write(Change([(number, make_event(number)) for number in range(1, 6)], total_events=5))
    assert main(["spool", "list", "--limit", limit]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == listed
    assert shown.err == ("... and 3 more: --limit 0 lists all\n" if listed == 2 else "")


def test_export_holds_everything_byte_for_byte(
    store: Store, entries: list[Entry], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store.write(Change(entries, total_events=3))
    assert main(["spool", "export"]) == 0
    printed = capsys.readouterr().out
    exported = lines(printed)
    assert [body_of(event) for event in exported] == [event.body for _, event in entries]
    assert {name: value for name, value in exported[1].items() if not name.startswith("body")} == {
        "sequence": 8,
        "id": entries[1][1].id,
        "workspace": "default",
        "type": "Message",
        "key": "z\u00fcrich \x1b[31m",
        "received_at": "2026-11-20T09:00:00.124Z",
        "time": "2026-11-20T09:00:01Z",
        "reason": None,
        "detail": None,
        "schema": None,
        "size": 8,
    }
    assert (exported[2]["reason"], exported[2]["detail"]) == ("no_key", "/_id: missing")
    output = tmp_path / "export.jsonl"
    assert main(["spool", "export", "--output", str(output)]) == 0
    assert output.read_text() == printed
    assert output.stat().st_mode & 0o777 == 0o600
    assert main(["spool", "export", "--output", str(output)]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["spool", "status"], ["spool", "list"], ["spool", "export"], ["dead", "list"], ["dead", "show", "1"],
     ["dead", "export"], ["dead", "requeue", "--all", "--wait", "0"]],
)  # fmt: skip
def test_without_a_spool_each_command_says_so_and_makes_none(
    command: list[str],
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make_event: MakeEvent,
) -> None:
    assert main(command) == 1
    assert f"no spool at {path}. Set RELAY_SPOOL_PATH" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == []
    monkeypatch.setenv("RELAY_ACK", "kafka")
    assert main(command) == 1
    assert "There is no spool: with RELAY_ACK=kafka" in capsys.readouterr().err
    # One from before can still be looked into.
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(1, make_event())], total_events=1, published=1, dead=[((1, make_event()), "error")]))
    assert main([*command, "--path", str(path)]) == 0


def test_settings_that_are_wrong_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RELAY_SPOOL_PAHT", "x")
    assert main(["spool", "status"]) == 2
    assert "RELAY_SPOOL_PATH is meant?" in capsys.readouterr().err


# --- relay dead ---


@pytest.fixture
def dead(store: Store, entries: list[Entry]) -> list[Entry]:
    """Return dead events that were announced; one was refused with words that a terminal would obey."""
    store.write(Change(entries, total_events=3, dead=[(entry, f"too large \x1b[{entry[0]}m") for entry in entries]))
    store.write(Change(published=9))
    return entries


def test_dead_list_has_a_line_for_each_with_what_kafka_said(
    dead: list[Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dead", "list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["7", "8", "9"]
    assert all(line.endswith(f"too large ?[{line.split()[0]}m") for line in shown)
    assert main(["dead", "list", "--json"]) == 0
    listed = lines(capsys.readouterr().out)
    assert [event["error"] for event in listed] == [f"too large \x1b[{number}m" for number in (7, 8, 9)]
    assert all(event["refused_at"] and not event["requested_at"] for event in listed)


def test_dead_show_has_the_event_the_error_and_the_body(
    dead: list[Entry], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    for sequence, event in dead:
        assert main(["dead", "show", str(sequence), "--body"]) == 0
        assert capsysbinary.readouterr().out == event.body
        assert main(["dead", "show", str(sequence), "--json"]) == 0
        shown = json.loads(capsysbinary.readouterr().out)
        assert body_of(shown) == event.body
        assert (shown["id"], shown["error"]) == (event.id, f"too large \x1b[{sequence}m")
    assert main(["dead", "show", "8"]) == 0
    text = capsysbinary.readouterr().out.decode()
    assert "too large ?[8m" in text
    assert text.endswith('{"?\ufffd?[2J\n')
    assert "\x1b" not in text


def test_dead_export_holds_everything_byte_for_byte(
    dead: list[Entry], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["dead", "export"]) == 0
    printed = capsys.readouterr().out
    assert [body_of(event) for event in lines(printed)] == [event.body for _, event in dead]
    assert [event["error"] for event in lines(printed)] == [f"too large \x1b[{number}m" for number in (7, 8, 9)]
    assert main(["dead", "export", "--output", str(tmp_path / "dead.jsonl")]) == 0
    assert (tmp_path / "dead.jsonl").read_text() == printed


@pytest.mark.parametrize("command", [["show", "5"], ["requeue", "5"], ["requeue", "7", "5"]])
def test_a_sequence_that_is_not_dead_is_refused(
    dead: list[Entry], store: Store, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main(["dead", *command]) == 1
    assert "no dead event 5: `relay dead list`" in capsys.readouterr().err
    assert store.requested(1 << 30) == []


@pytest.mark.parametrize("command", [[], ["7", "--all"], ["seven"]])
def test_requeue_must_be_told_which(dead: list[Entry], store: Store, command: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["dead", "requeue", *command])
    assert exit_.value.code == 2
    assert store.requested(1 << 30) == []


def test_without_a_relay_requeue_says_that_the_next_start_takes_it_up(
    path: Path, make_event: MakeEvent, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(published=1, dead=[((1, make_event()), "error")]))
    (path.parent / "relay.db.lock").write_text("999999999\n")
    assert main(["dead", "requeue", "1"]) == 0
    assert capsys.readouterr().out == "1: requested; no relay runs on this spool, the next start takes it up\n"
    assert main(["dead", "list"]) == 0
    assert capsys.readouterr().out.endswith("error  (to be requeued)\n")
    (path.parent / "relay.db.lock").unlink()
    assert main(["dead", "requeue", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"sequence": 1, "state": "requested", "dead_as": None, "error": None}
    ]


def test_requeue_of_nothing_says_so(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead", "requeue", "--all"]) == 0
    assert capsys.readouterr().out == "There are no dead events.\n"


# --- relay dead requeue, while a relay runs ---


@asynccontextmanager
async def running(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spool]:
    """A relay without Kafka: what it publishes is the test's to say."""
    monkeypatch.setattr(requeue_module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.01)
    spool = await Spool.open(path, max_bytes=MAX_BYTES, dedupe_seconds=300, metrics=Metrics(CollectorRegistry()))
    requeue = asyncio.create_task(requeue_what_is_requested(spool))
    try:
        yield spool
    finally:
        requeue.cancel()
        await asyncio.wait([requeue])
        await spool.close()


async def take(spool: Spool, count: int) -> list[Entry]:
    async with asyncio.timeout(10):
        await spool.wait(count)
    return await spool.take(count, 1 << 30)


async def bury(spool: Spool, event: Event) -> Entry:
    await spool.append(event)
    (entry,) = await take(spool, 1)
    await spool.bury(entry, "too large")
    spool.published(entry[0])
    return entry


async def command(*arguments: str) -> int:
    return await asyncio.to_thread(main, arguments)


async def test_requeue_tells_what_became_of_each(
    path: Path, make_event: MakeEvent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(path, monkeypatch) as spool:
        published, refused, left = [await bury(spool, make_event(number)) for number in range(3)]
        asked = asyncio.create_task(command("dead", "requeue", str(published[0]), str(refused[0]), "--wait", "20"))
        entries = await take(spool, 2)
        assert [event for _, event in entries] == [published[1], refused[1]]
        await spool.bury(entries[1], "still too large")
        spool.published(entries[1][0])
        assert await asked == 1
        assert capsys.readouterr().out.splitlines() == [
            f"{published[0]}: published",
            f"{refused[0]}: refused again, dead as {entries[1][0]}: still too large",
        ]
        assert sorted(spool.dead) == [left[0], entries[1][0]]


async def test_requeue_of_all_ends_with_0_once_all_are_published(
    path: Path, make_event: MakeEvent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(path, monkeypatch) as spool:
        dead = [await bury(spool, make_event(number)) for number in range(3)]
        asked = asyncio.create_task(command("dead", "requeue", "--all", "--json", "--wait", "20"))
        spool.published((await take(spool, 3))[-1][0])
        assert await asked == 0
        outcomes = json.loads(capsys.readouterr().out)
        assert [(outcome["sequence"], outcome["state"]) for outcome in outcomes] == [
            (sequence, "published") for sequence, _ in dead
        ]


async def test_requeue_does_not_wait_for_kafka_for_ever(
    path: Path, make_event: MakeEvent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    async with running(path, monkeypatch) as spool:
        dead = await bury(spool, make_event(0))
        requeued = asyncio.create_task(command("dead", "requeue", "--all", "--wait", "1"))
        await until(lambda: spool.depth)
        assert await requeued == 0
        assert capsys.readouterr().out == f"{dead[0]}: in the queue, waits for Kafka\n"


async def test_requeue_says_what_a_running_relay_has_not_taken_up(
    path: Path, make_event: MakeEvent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(path, monkeypatch) as spool:
        await spool.append(make_event())
        (entry,) = await take(spool, 1)
        await spool.bury(entry, "too large")  # And not announced.
        assert await command("dead", "requeue", "--all", "--wait", "0.3") == 0
        assert capsys.readouterr().out.startswith(f"{entry[0]}: requested; the relay takes it up as soon as")


def test_a_reader_that_has_seen_enough_is_no_fault(
    store: Store, make_event: MakeEvent, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(Change([(number, make_event(number)) for number in range(1, 6)], total_events=5))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed_pipe:
        monkeypatch.setattr("sys.stdout", closed_pipe)
        assert main(["spool", "export"]) == 1
        monkeypatch.undo()
    assert capfd.readouterr().err == ""
