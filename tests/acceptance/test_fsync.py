"""The real process asks the kernel for durability before it answers: its system calls, as strace sees them."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from kafka_for_tests import FoundKafka

EVENTS = 20
CALLS = "mkdir,mkdirat,openat,pwrite64,pwritev,write,writev,sendto,sendmsg,fsync,fdatasync"
SYNCS = ("fsync", "fdatasync")


class Call(NamedTuple):
    """A system call that succeeded."""

    name: str
    #: Of the file that it is about.
    path: str
    arguments: str
    #: Lines of the trace, in the order in which it happened.
    began: int
    ended: int


@pytest.fixture
def strace(tmp_path: Path) -> list[str]:
    """Return the beginning of a command line whose system calls are written to strace.log."""
    # -D: the traced process stays this one's child, to be ended by signal. -s: whole pages, to find an event in them.
    command = [
        "strace",
        "-D",
        "-f",
        "-qq",
        "-y",
        "-s",
        "8192",
        "-e",
        f"trace={CALLS}",
        "-o",
        str(tmp_path / "strace.log"),
    ]
    if not shutil.which("strace") or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no strace here, or no right to use it; test_power_loss.py looks at SQLite's own calls instead")
    return command


def calls(log: Path) -> list[Call]:
    return [call for call in _calls(log) if call.path]


def _calls(log: Path) -> Iterator[Call]:
    unfinished: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(log.read_text(errors="replace").splitlines()):
        thread, _, told = line.partition(" ")
        began = number
        told = told.strip()
        if told.endswith("<unfinished ...>"):
            unfinished[thread] = (number, told.removesuffix("<unfinished ...>"))
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", told):
            began, start = unfinished.pop(thread)
            told = start + told[resumed.end() :]
        if match := re.fullmatch(r'(\w+)\((?:\d+<([^>]*)>|AT_FDCWD[^,]*, "([^"]*)"|"([^"]*)")(.*)\)\s+= \d+.*', told):
            name, of_descriptor, at, plain, arguments = match.groups()
            yield Call(name, of_descriptor or at or plain or "", arguments, began, number)


def test_an_event_is_fsynced_before_its_answer_and_the_spool_s_names_before_the_first(
    make_relay: MakeRelay, strace: list[str], tmp_path: Path
) -> None:
    relay = make_relay(FoundKafka("127.0.0.1:1", "none"), RELAY_DRAIN_SECONDS="0").start(under=strace)
    chats = [new_chat() for _ in range(EVENTS)]

    assert [post(relay.port, message(chat)).status for chat in chats] == [200] * EVENTS

    relay.stop()
    made = calls(tmp_path / "strace.log")
    answers = [call for call in made if "HTTP/1.1 200 OK" in call.arguments]
    assert len(answers) == EVENTS
    log = str(relay.spool_path) + "-wal"
    for chat, answer in zip(chats, answers, strict=True):
        written = first(made, lambda call, chat=chat: call.path == log and chat in call.arguments)  # type: ignore[misc]
        synced = first(
            made,
            lambda call, after=written.ended: call.path == log and call.name in SYNCS and call.began > after,  # type: ignore[misc]
        )
        assert synced.ended < answer.began
    # A new file is as durable as its name, and as that of its new directory.
    named = {call.path for call in made if call.name in SYNCS and call.ended < answers[0].began}
    assert {str(relay.spool_path.parent), str(relay.directory)} <= named


def first(made: list[Call], wanted: Callable[[Call], bool]) -> Call:
    return next(call for call in made if wanted(call))
