import hmac
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from relay.auth import Match, Tokens
from relay.errors import BadToken
from relay.values import Secret


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = 1_000.0

    def __call__(self) -> float:
        return self.time

    def pass_time(self) -> None:
        self.time += 5


@pytest.fixture
def clock() -> Clock:
    return Clock()


def replace(path: Path, text: str) -> None:
    # As a mounted secret changes: at once, by a new file.
    new = path.with_name(f".new-{path.name}")
    new.write_text(text)
    new.replace(path)


def refused(tokens: Tokens, workspace: str, shown: str | None) -> bool:
    try:
        tokens.match(workspace, shown)
    except BadToken:
        return True
    return False


# --- Who is let in. ---


def test_the_token_lets_in() -> None:
    assert Tokens(Secret("right"), None).match("default", "right") == Match("default", "1")


@pytest.mark.parametrize(
    "shown", [None, "", " ", "wrong", "righ", "right ", "Right", "rightright", "r\udcc3\udca4", "\x00"]
)
def test_anything_else_does_not(shown: str | None) -> None:
    assert refused(Tokens(Secret("right"), None), "default", shown)


def test_several_tokens_are_valid_at_once_and_told_apart() -> None:
    tokens = Tokens(Secret("new\n old \n\n\nolder\n"), None)
    assert [tokens.match("default", shown).slot for shown in ("new", "old", "older")] == ["1", "2", "3"]
    assert refused(tokens, "default", "new\nold")


def test_a_token_beyond_ascii_is_compared_as_the_header_s_bytes() -> None:
    tokens = Tokens(Secret("z\u00fcrich"), None)
    assert tokens.match("default", "z\u00fcrich").slot == "1"
    # How aiohttp hands over bytes that are not UTF-8.
    assert refused(tokens, "default", b"z\xfcrich".decode("utf-8", "surrogateescape"))


def test_an_unknown_workspace_is_refused_like_a_wrong_token() -> None:
    tokens = Tokens(Secret("right"), None)
    assert refused(tokens, "acme", "right")


def test_each_workspace_has_its_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "acme").write_text("a1\na2\n")
    (tmp_path / "umbrella").write_text("u1")
    tokens = Tokens(Secret("d1"), tmp_path)
    assert tokens.workspaces == ["acme", "default", "umbrella"]
    assert tokens.match("acme", "a2") == Match("acme", "2")
    assert tokens.match("umbrella", "u1") == Match("umbrella", "1")
    assert tokens.match("default", "d1") == Match("default", "1")
    for workspace, shown in (("acme", "u1"), ("acme", "d1"), ("umbrella", "a1"), ("default", "a1"), ("initech", "a1")):
        assert refused(tokens, workspace, shown)


def test_without_any_token_everybody_is_welcome_at_the_default_workspace_alone() -> None:
    tokens = Tokens(None, None)
    assert tokens.match("default", None) == Match("default", "")
    assert tokens.match("default", "whatever") == Match("default", "")
    assert refused(tokens, "acme", None)
    assert tokens.workspaces == ["default"]


def test_with_a_directory_of_workspaces_nobody_is_let_in_without_a_token(tmp_path: Path) -> None:
    tokens = Tokens(None, tmp_path)
    assert refused(tokens, "default", None)
    assert refused(tokens, "default", "")
    assert tokens.workspaces == []


def test_a_wrong_token_and_an_unknown_workspace_take_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme").write_text("a1\na2\na3\n")
    (tmp_path / "umbrella").write_text("u1")
    tokens = Tokens(Secret("d1"), tmp_path)
    compared = 0
    compare = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    work = set()
    for workspace, shown in (("acme", "a1"), ("acme", "x"), ("umbrella", "x"), ("unknown", "x"), ("default", None)):
        compared = 0
        refused(tokens, workspace, shown)
        work.add(compared)
    assert work == {3}


# --- Files that change. ---


def test_a_token_is_changed_without_a_restart(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    tokens = Tokens(Secret(path=file), None, clock=clock)
    replace(file, "new\nold\n")
    clock.pass_time()
    assert tokens.match("default", "new").slot == "1"
    assert tokens.match("default", "old").slot == "2"
    replace(file, "new\n")
    clock.pass_time()
    assert refused(tokens, "default", "old")


def test_files_are_looked_at_once_a_second_at_most(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    tokens = Tokens(Secret(path=file), None, clock=clock)
    replace(file, "new")
    clock.time += 0.9
    assert refused(tokens, "default", "new")
    clock.time += 0.2
    assert tokens.match("default", "new").slot == "1"


def test_workspaces_come_and_go(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "acme").write_text("a1")
    told: list[Mapping[str, tuple[bytes, ...]]] = []
    tokens = Tokens(None, tmp_path, on_change=told.append, clock=clock)
    (tmp_path / "umbrella").write_text("u1\nu2")
    (tmp_path / "acme").unlink()
    clock.pass_time()
    assert tokens.match("umbrella", "u2") == Match("umbrella", "2")
    assert refused(tokens, "acme", "a1")
    assert [sorted(seen) for seen in told] == [["acme"], ["umbrella"]]


def test_the_versions_that_a_mounted_secret_keeps_are_no_workspaces(tmp_path: Path, clock: Clock) -> None:
    # ..data points to the version in force, and each name points through it.
    for version, token in (("..2026_01", "old"), ("..2026_02", "new")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "acme").write_text(token)
    (tmp_path / "..data").symlink_to("..2026_01")
    (tmp_path / "acme").symlink_to("..data/acme")
    tokens = Tokens(None, tmp_path, clock=clock)
    assert tokens.workspaces == ["acme"]
    assert tokens.match("acme", "old")
    (tmp_path / "..new").symlink_to("..2026_02")
    (tmp_path / "..new").replace(tmp_path / "..data")
    clock.pass_time()
    assert tokens.match("acme", "new")
    assert refused(tokens, "acme", "old")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_what_cannot_be_used_leaves_the_tokens_as_they_were(tmp_path: Path, clock: Clock, content: bytes) -> None:
    file = tmp_path / "acme"
    file.write_text("a1")
    tokens = Tokens(None, tmp_path, clock=clock)
    file.write_bytes(content)
    clock.pass_time()
    assert tokens.match("acme", "a1")
    replace(file, "a2")
    clock.pass_time()
    assert tokens.match("acme", "a2")


def test_a_file_that_is_gone_leaves_the_tokens_as_they_were(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text("t1")
    tokens = Tokens(Secret(path=file), None, clock=clock)
    file.unlink()
    for _ in range(5):
        clock.pass_time()
        assert tokens.match("default", "t1")
    assert [getattr(record, "action", "") for record in caplog.records] == ["tokens_unreadable"]
    file.write_text("t2")
    clock.pass_time()
    assert tokens.match("default", "t2")


def test_an_unusable_name_leaves_all_workspaces_as_they_were(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "acme").write_text("a1")
    tokens = Tokens(None, tmp_path, clock=clock)
    (tmp_path / "no spaces").write_text("x")
    (tmp_path / "umbrella").write_text("u1")
    clock.pass_time()
    assert tokens.match("acme", "a1")
    assert refused(tokens, "umbrella", "u1")


@pytest.mark.parametrize("name", ["no spaces", "a+b", "-x", "x" * 64, "z\u00fcrich", "{type}"])
def test_a_name_that_cannot_stand_in_a_path_or_topic_is_refused_at_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="workspace"):
        Tokens(None, tmp_path)


def test_a_workspace_without_a_token_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "acme").write_text("\n")
    with pytest.raises(ValueError, match="acme"):
        Tokens(None, tmp_path)


def test_the_default_workspace_has_its_tokens_from_one_place(tmp_path: Path) -> None:
    (tmp_path / "default").write_text("x")
    assert Tokens(None, tmp_path).match("default", "x")
    with pytest.raises(ValueError, match="RELAY_TOKEN"):
        Tokens(Secret("y"), tmp_path)


def test_a_workspace_that_cannot_be_read_is_told_at_start(tmp_path: Path) -> None:
    (tmp_path / "acme").mkdir()
    with pytest.raises(OSError, match="acme"):
        Tokens(None, tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokens(None, tmp_path / "nowhere")


def test_no_token_is_logged(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    file = tmp_path / "token"
    file.write_text("sesame-1")
    tokens = Tokens(Secret(path=file), None, clock=clock)
    for content in (b"sesame-2", b"\xff sesame-3", b"sesame-4"):
        file.write_bytes(content)
        os.utime(file, ns=(clock.time.__trunc__(), clock.time.__trunc__()))
        clock.pass_time()
        refused(tokens, "default", "sesame-5")
    assert caplog.records
    assert "sesame" not in caplog.text
