import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from registry_for_tests import StubRegistry, stub_registry

from relay.check import check
from relay.cli import main
from relay.config import Settings
from relay.finding import Finding
from relay.schemas import Schemas

SCHEMAS = {schema.name: schema for schema in Schemas.load()}
SAVED = "rocketchat.omnichannel-chat.rocket.omnichannel.message.saved"


@pytest.fixture
async def stub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StubRegistry]:
    """Yield the registry that the settings name."""
    async with stub_registry() as stub:
        monkeypatch.setenv("RELAY_SCHEMA_REGISTRY_URL", stub.url)
        yield stub


async def relay(*arguments: str) -> int:
    return await asyncio.to_thread(main, arguments)


def refuse(stub: StubRegistry, name: str) -> None:
    """Has the registry find that schema incompatible with what its subject has."""
    stub.schemas, stub.subjects = ["{}"], {SAVED: [1]}
    stub.incompatible = {SCHEMAS[name].text}


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, list)
    return found


# --- relay schemas list ---


def test_a_list_names_every_schema_with_its_subject_and_needs_no_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemas", "list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(SCHEMAS)
    assert ["Message", "message-saved.json", SAVED] in lines


def test_each_workspace_with_a_topic_of_its_own_has_subjects_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("east", "west"):
        (tmp_path / name).write_text("token")
    monkeypatch.setenv("RELAY_WORKSPACES_DIR", str(tmp_path))
    monkeypatch.setenv("RELAY_TOPIC", "chats.{workspace}")
    monkeypatch.setenv("RELAY_SUBJECT_STRATEGY", "topic")
    assert main(["schemas", "list", "--json"]) == 0
    assert {name for it in printed(capsys) for name in it["subjects"]} == {"chats.east-value", "chats.west-value"}


# --- relay schemas check, register ---


@pytest.mark.parametrize("action", ["check", "register"])
def test_without_a_registry_its_setting_is_named(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemas", action]) == 2
    assert "RELAY_SCHEMA_REGISTRY_URL" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["check", "register"])
def test_a_registry_that_does_not_answer_is_told_once(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_SCHEMA_REGISTRY_URL", "http://127.0.0.1:1")
    assert main(["schemas", action]) == 1
    assert capsys.readouterr().err.count("does not answer") == 1


async def test_a_check_says_what_registering_would_come_to_and_changes_nothing(
    stub: StubRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await relay("schemas", "check", "--json") == 0
    found = printed(capsys)
    assert {(it["ok"], it["standing"], it["id"]) for it in found} == {(True, "new", None)}
    assert len(found) == len(SCHEMAS)
    assert (stub.subjects, stub.schemas, stub.settings) == ({}, [], {})


async def test_registering_is_told_with_the_ids_and_is_done_whatever_a_relay_may(
    stub: StubRegistry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_SCHEMA_REGISTER", "false")
    assert await relay("schemas", "register") == 0
    assert f"ok   {SAVED}: is registered: id 2, version 1\n" in capsys.readouterr().out
    assert len(stub.subjects) == len(SCHEMAS)
    assert await relay("schemas", "check", "--json") == 0
    assert sorted(it["id"] for it in printed(capsys)) == [*range(1, len(SCHEMAS) + 1)]


@pytest.mark.parametrize("action", ["check", "register"])
async def test_what_is_refused_is_told_with_the_reason_and_the_others_all_the_same(
    action: str, stub: StubRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(stub, "message-saved")
    assert await relay("schemas", action) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [
        f"FAIL {SAVED}: would be refused: PROPERTY_REMOVED at #/properties/x"
    ]
    assert len(lines) == len(SCHEMAS)


# --- relay check ---


async def findings(stub: StubRegistry, **environ: str) -> list[Finding]:
    given = {"RELAY_ALLOW_UNAUTHENTICATED": "true", "RELAY_SCHEMA_REGISTRY_URL": stub.url, **environ}
    # Of Kafka, which is not there, nothing is asked here.
    found = await check(Settings.read(given | {"RELAY_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}))
    return [it for it in found if it.subject.startswith(("subject ", "registry"))]


def of_saved(found: Sequence[Finding]) -> Finding:
    return next(it for it in found if it.subject == f"subject {SAVED}")


async def test_what_serving_would_register_is_no_fault(stub: StubRegistry) -> None:
    found = await findings(stub)
    assert (len(found), {it.ok for it in found}) == (len(SCHEMAS), {True})
    assert "`relay serve` registers it" in of_saved(found).text


async def test_what_a_relay_may_not_register_is_a_fault_until_somebody_did(stub: StubRegistry) -> None:
    missing = await findings(stub, RELAY_SCHEMA_REGISTER="false")
    assert {it.ok for it in missing} == {False}
    assert "`relay schemas register`" in of_saved(missing).text
    assert await relay("schemas", "register") == 0
    assert {it.ok for it in await findings(stub, RELAY_SCHEMA_REGISTER="false")} == {True}


async def test_a_schema_that_would_be_refused_is_a_fault(stub: StubRegistry) -> None:
    refuse(stub, "message-saved")
    found = await findings(stub)
    assert [it.subject for it in found if not it.ok] == [f"subject {SAVED}"]
    assert "PROPERTY_REMOVED" in of_saved(found).text


async def test_a_registry_without_guids_is_a_fault_where_headers_need_them(stub: StubRegistry) -> None:
    assert await relay("schemas", "register") == 0
    assert {it.ok for it in await findings(stub, RELAY_SCHEMA_FRAMING="header")} == {True}
    stub.guids = False
    found = await findings(stub, RELAY_SCHEMA_FRAMING="header")
    assert {it.ok for it in found} == {False}
    assert "RELAY_SCHEMA_FRAMING=prefix" in of_saved(found).text


async def test_a_registry_that_does_not_answer_is_one_fault(stub: StubRegistry) -> None:
    (found,) = await findings(stub, RELAY_SCHEMA_REGISTRY_URL="http://127.0.0.1:1")
    assert (found.ok, found.subject) == (False, "registry")
    assert "127.0.0.1:1" in found.text
