"""What `make test` leaves out: the guide's table and query in a real Flink, which runs in one process."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from consumers.published import Event, Printing, Published, Show
from consumers.test_guide import class_path, compiled

from relay.dev.download import cache_dir, digest_of, install, read_lock
from relay.dev.java import find_java
from relay.event import EVENT_TYPES, OFFLINE_MESSAGE

pytestmark = [
    pytest.mark.skipif("RELAY_TEST_CONSUMERS" not in os.environ, reason="needs Flink: make test-consumers"),
    pytest.mark.parametrize("events", ["none"], indirect=True),
]

HERE = Path(__file__).parent
OPTIONS = ("-Xmx512m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
TYPES = {kind.name: kind.ce_type for kind in EVENT_TYPES.values()}

Flink = Callable[..., Printing]


@pytest.fixture(scope="session")
def flink_command() -> Iterator[Sequence[object]]:
    """Yield the command that runs a file of SQL; the first time Flink is downloaded (134 MB)."""
    jars = install(artifacts := read_lock(HERE / "flink.lock"), cache_dir() / f"flink-{digest_of(artifacts)[:12]}")
    java = find_java()
    with tempfile.TemporaryDirectory() as unpacked:  # Each start unpacks 40 MB, and a killed one leaves them.
        classes = compiled(HERE / "FlinkSql.java", Path(unpacked, "classes"), java, jars)
        options = (*OPTIONS, f"-Djava.io.tmpdir={unpacked}")
        yield java.executable, *options, "-cp", class_path(classes, *jars), "FlinkSql"


@pytest.fixture
def flink(events: Published, show: Show, flink_command: Sequence[object], tmp_path: Path) -> Flink:
    """Return a function that runs the guide's SQL, as it stands or with another query of its table."""

    def flink(query: str = "") -> Printing:
        file = events.write("events.sql", tmp_path)
        table, the_guides = file.read_text().replace("localhost:9092", events.kafka).split("\n\n")
        file.write_text(f"{table}\n{query or the_guides}")
        return show(*flink_command, file)

    return flink


def rows(printing: Printing, count: int) -> list[list[Any]]:
    """The first rows of the query, those of each chat together."""
    return sorted((json.loads(line) for line in printing.wait_for(count)), key=lambda row: str(row[0]))


def test_flinks_query_gives_the_transcripts(events: Published, flink: Flink) -> None:
    transcripts = [
        [chat, message["ts"], message["username"], message.get("msg")]
        for chat, sent in sorted(events.chats.items())
        for event in sent
        if TYPES[event["type"]] == "chat.rocket.omnichannel.session.closed"
        for message in event["messages"]
    ]
    assert rows(flink(), len(transcripts)) == transcripts


def test_flinks_table_has_every_event(events: Published, flink: Flink) -> None:
    query = """
        SELECT chat, ce_type, `_id`, label, visitor.username, closer, CARDINALITY(messages), messages[1].`editedAt`,
          CAST(headers['ce_time'] AS STRING), CAST(ce_time AS STRING)
        FROM omnichannel;
    """
    printed = rows(flink(query), sum(map(len, events.chats.values())) + 1)
    [offline] = [row for row in printed if row[0] not in events.chats]
    assert offline[0].startswith("offline:")
    assert offline[1] == TYPES[OFFLINE_MESSAGE]
    sent = [event for _, chat in sorted(events.chats.items()) for event in chat]
    assert [row[:-2] for row in printed if row is not offline] == [columns(event) for event in sent]
    for *_, header, time in printed:
        assert datetime.fromisoformat(header) == datetime.fromisoformat(f"{time}Z")


def columns(event: Event) -> list[object]:
    """What the table has of an event, but its time."""
    messages = event.get("messages")
    first = messages[0] if messages else {}
    return [
        *(event["_id"], TYPES[event["type"]], event["_id"], event.get("label"), event["visitor"]["username"]),
        *(event.get("closer"), None if messages is None else len(messages), first.get("editedAt")),
    ]
