"""The examples of schemas/README.md do what it says, run from its very text on a real Kafka."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from consumers.published import GUIDE, Published, Show

from relay.dev.download import cache_dir, digest_of, install, read_lock
from relay.dev.java import Java
from relay.dev.kafka_runtime import Runtime
from relay.event import EVENT_TYPES, DeadLetterReason

ECJ = Path(__file__).with_name("ecj.lock")


def by_chat(lines: Sequence[str]) -> dict[str, list[str]]:
    """The lines of each conversation, by its chat; each is printed once."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if match := re.fullmatch(r"(\S+) closed by the (user|visitor)", line):
            assert match[1] not in found
            found[match[1]] = []
        found[list(found)[-1]].append(line)
    return found


def rebuilt(events: Published) -> int:
    """How many lines all conversations are."""
    return sum(map(len, events.conversations.values()))


def test_python_rebuilds_the_conversations(events: Published, show: Show, tmp_path: Path) -> None:
    printing = show(sys.executable, events.write("conversations.py", tmp_path))
    assert by_chat(printing.wait_for(rebuilt(events))) == events.conversations


def test_java_rebuilds_the_conversations(events: Published, show: Show, tmp_path: Path, kafka_runtime: Runtime) -> None:
    java, jars = kafka_runtime.java, kafka_runtime.jars
    classes = compiled(events.write("Conversations.java", tmp_path), tmp_path / "classes", java, jars)
    printing = show(java.executable, "-cp", class_path(classes, *jars), "Conversations")
    assert by_chat(printing.wait_for(rebuilt(events))) == events.conversations


def compiled(source: Path, into: Path, java: Java, jars: Sequence[Path]) -> Path:
    """The folder *into* with the classes of *source*, compiled as Java 17 with *jars* as its libraries."""
    [compiler] = install(artifacts := read_lock(ECJ), cache_dir() / f"ecj-{digest_of(artifacts)[:12]}")
    command = [java.executable, "-jar", compiler, "-17", "-proc:none", "-cp", class_path(*jars), "-d", into, source]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return into


def class_path(*places: Path) -> str:
    """What Java is given to find its classes in."""
    return os.pathsep.join(map(str, places))


@pytest.mark.parametrize("events", ["prefix"], indirect=True)
def test_confluents_python_client_prints_the_events(events: Published, show: Show, tmp_path: Path) -> None:
    names = {kind.name: kind.slug for kind in EVENT_TYPES.values()}
    printing = show(sys.executable, events.write("events.py", tmp_path))
    lines = [line.split(" ") for line in printing.wait_for(sum(map(len, events.chats.values())) + 1)]
    for chat, sent in events.chats.items():
        printed = [(kind, count) for key, _, kind, count in lines if key == chat]
        assert printed == [(names[event["type"]], str(len(event["messages"]))) for event in sent]
    [(key, _, kind, _)] = [line for line in lines if line[0] not in events.chats]
    assert (key.partition(":")[0], kind) == ("offline", "offline-message.left")


def test_every_example_is_run() -> None:
    marked = re.findall(r"^```(\w+) (\S+)$", GUIDE.read_text(), re.MULTILINE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {name for _, name in marked if f'"{name}"' not in tests} == set()
    assert {language for language, _ in marked} == {"python", "java", "js", "sh", "sql"}


def test_the_guide_knows_every_type_and_every_reason() -> None:
    def first_column(heading: str) -> set[str]:
        section = GUIDE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
        return set(re.findall(r"^\| `([^`]+)` \|", section.rpartition("|---|---|")[2], re.MULTILINE))

    assert first_column("What lands where") == {kind.slug for kind in EVENT_TYPES.values()}
    assert first_column("Dead letters") == set(DeadLetterReason)


def test_links_lead_somewhere() -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", GUIDE.read_text()):
        file = (GUIDE.parent / target).resolve() if target else GUIDE
        assert file.exists()
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", it.lower()).replace(" ", "-") for it in headings}
