"""Chats as a real relay published them, and what has to be rebuilt from them."""

import itertools
import json
import random
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from relay_process import TOKEN, RelayProcess, wait_until

from relay.dev.chats import conversation, offline_message

GUIDE = Path(__file__).parents[2] / "schemas" / "README.md"
Event = dict[str, Any]


def example(name: str) -> str:
    """The block of the guide that is to be saved under that name."""
    [text] = re.findall(rf"^```\w+ {re.escape(name)}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


@dataclass(frozen=True)
class Published:
    """A topic of a real Kafka with events in it."""

    kafka: str
    registry: str
    topic: str
    #: The events of each chat, in the order in which the relay accepted them.
    chats: Mapping[str, Sequence[Event]]
    #: For each chat, as the examples print it: all that was said in it.
    conversations: Mapping[str, Sequence[str]]
    #: The same of what its close says.
    transcripts: Mapping[str, Sequence[str]]

    def write(self, name: str, directory: Path) -> Path:
        """The example of that name as a file, with this topic and a consumer group of its own."""
        text = example(name).replace("rocketchat.omnichannel", self.topic)
        text = re.sub(r'(group[._]?id"?[=:,] *")', rf"\g<1>{self.topic}-", text, flags=re.IGNORECASE)
        file = directory / name
        file.write_text(text)
        return file

    def environ(self) -> dict[str, str]:
        """What the guide says that an example is given."""
        return {"KAFKA": self.kafka, "REGISTRY": self.registry}


@contextmanager
def published(directory: Path, kafka: str, registry: str, topic: str) -> Iterator[Published]:
    """
    Yields what a relay made of three chats, an offline message and a body that is no event, with an aborted
    transaction of somebody else's in between. With a *registry* the values are framed.
    """
    settings = {
        "RELAY_TOPIC": topic,
        "RELAY_DEAD_LETTER_TOPIC": f"{topic}.dead-letter",
        "RELAY_WATERMARK_TOPIC": f"{topic}.watermarks",
        "RELAY_TOPIC_CREATE": "true",
    }
    if registry:
        settings["RELAY_SCHEMA_REGISTRY_URL"] = registry
    plain, reordered, deleted = chats = [_chat(seed) for seed in (1, 2, 3)]
    deletions = [_reorder(reordered), _delete(deleted)]
    before, after = zip(*((chat[:-2], chat[-2:]) for chat in chats), strict=True)
    relay = RelayProcess(directory, kafka, settings)
    try:
        relay.start(connected=True)
        _deliver(relay, _mixed(before))
        _deliver(relay, [json.loads(offline_message(random.Random(1), sent_at=datetime.now(UTC))), {"type": "Unheard"}])
        relay.wait_until_drained()
        _abort(kafka, topic, plain[-2])
        _deliver(relay, _mixed(after))
        relay.wait_until_drained()
    finally:
        relay.close()
    yield Published(
        kafka,
        registry,
        topic,
        {chat[0]["_id"]: chat for chat in chats},
        {chat[0]["_id"]: _printed(chat, gone) for chat, gone in zip(chats, ([], *deletions), strict=True)},
        {chat[0]["_id"]: _printed(chat, []) for chat in chats},
    )


def _chat(seed: int) -> list[Event]:
    return [json.loads(it) for it in conversation(random.Random(seed), started_at=datetime(2026, 1, 1, 12, tzinfo=UTC))]


def _reorder(chat: list[Event]) -> list[Event]:
    """Has a message come only after its edit, and deleted later, so that no transcript says what it was in the end."""
    edit = next(it for it in chat if it["type"] == "Message" and it["messages"][0].get("editedAt"))
    [edited] = edit["messages"]
    original = next(it for it in chat if it["type"] == "Message" and it["messages"][0]["_id"] == edited["_id"])
    chat.insert(chat.index(edit), chat.pop(chat.index(original)))
    _take_out(chat, edited)
    return [edited]


def _delete(chat: list[Event]) -> list[Event]:
    """Has a message deleted after it was sent: no transcript has it."""
    [message] = next(it for it in chat if it["type"] == "Message")["messages"]
    _take_out(chat, message)
    return [message]


def _take_out(chat: list[Event], message: Event) -> None:
    for event in chat:
        if event["type"] != "Message":
            event["messages"] = [it for it in event["messages"] if it["_id"] != message["_id"]]


def _printed(chat: Sequence[Event], gone: Sequence[Event]) -> list[str]:
    """The messages of the close, and those that were deleted before it."""
    closed = chat[-2]
    said = sorted([*closed["messages"], *gone], key=lambda message: str(message["ts"]))
    lines = [f"{closed['_id']} closed by the {closed['closer']}"]
    for message in said:
        text = message.get("msg") or message.get("file", {}).get("name", "")
        lines += f"  {message['ts'][11:19]} {message['username']} {text}".split("\n")
    return [line.rstrip() for line in lines]


def _mixed(chats: Sequence[Sequence[Event]]) -> list[Event]:
    return [event for turn in itertools.zip_longest(*chats) for event in turn if event]


def _deliver(relay: RelayProcess, events: Sequence[Event]) -> None:
    for event in events:
        body = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {"X-RocketChat-Livechat-Token": TOKEN}
        with urllib.request.urlopen(urllib.request.Request(relay.url, body, headers), timeout=10) as answer:
            assert answer.status == 200


def _abort(kafka: str, topic: str, closed: Event) -> None:
    """Writes to every partition that a chat was closed, and takes it back."""
    body = json.dumps({**closed, "_id": "aborted"}).encode()
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": topic, "compression.type": "zstd"})
    producer.init_transactions(30)
    producer.begin_transaction()
    headers: list[tuple[str, str | bytes | None]] = [
        ("ce_type", "chat.rocket.omnichannel.session.closed"),
        ("ce_time", "2026-01-01T12:00:00Z"),
    ]
    for partition in producer.list_topics(topic, timeout=30).topics[topic].partitions:
        producer.produce(topic, body, "aborted", partition, headers=headers)
    producer.flush(30)
    producer.abort_transaction(30)


class Printing:
    """A command that runs until it is killed, and what it has printed so far."""

    def __init__(self, command: Sequence[object], environ: Mapping[str, str], directory: Path) -> None:
        self._output, self._errors = directory / "output", directory / "errors"
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                list(map(str, command)), cwd=directory, env=dict(environ), stdout=output, stderr=errors
            )

    def lines(self) -> list[str]:
        """Every whole line."""
        return [line.rstrip() for line in self._output.read_bytes().decode().split("\n")[:-1]]

    def wait_for(self, count: int) -> list[str]:
        """Every line once there are that many."""

        def printed() -> bool:
            running = self._process.poll() is None
            assert running or len(self.lines()) >= count, self._errors.read_text(errors="replace")[-2000:]
            return len(self.lines()) >= count

        try:
            wait_until(printed, f"{count} lines", seconds=180, pause=0.05)
        except AssertionError as error:
            self._process.send_signal(signal.SIGABRT)  # Python says where it is then.
            self._process.wait(10)
            told = [*self.lines()[-5:], self._errors.read_text(errors="replace")[-6000:]]
            raise AssertionError("\n".join([str(error), *told])) from None
        return self.lines()

    def finish(self) -> list[str]:
        """Every line once the command has ended by itself."""
        assert self._process.wait(180) == 0, self._errors.read_text(errors="replace")
        return self.lines()

    def close(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.wait()


Show = Callable[..., Printing]
