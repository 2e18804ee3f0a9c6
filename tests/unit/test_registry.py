import json
import ssl
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_proxy import Answer, Cut, FaultyProxy, Hold, Reset, faulty_proxy
from registry_for_tests import StubRegistry, stub_registry

from relay.errors import (
    GuidMissing,
    RegistryError,
    RegistryFailed,
    RegistryNotThere,
    RegistryRefused,
    RegistryUnreachable,
    SchemaIncompatible,
    SchemaMissing,
    SchemaRefused,
)
from relay.framing import Frame, Registered, fingerprint, frame, registrations, subject, unframed
from relay.registry import COMPATIBILITY, Registry, Standing, basic, bearer
from relay.schemas import DRAFT_07, Schemas

GUID = uuid.UUID("89791762-2336-4186-9674-299b90a802e2")
TEXT = json.dumps({"$schema": DRAFT_07, "type": "object", "properties": {"_id": {"type": "string"}}})
OTHER = json.dumps({"$schema": DRAFT_07, "type": "object", "properties": {"_id": {"type": "number"}}})
UNREACHABLE = "http://127.0.0.1:1"

# Self-signed for 127.0.0.1, made for these tests: `openssl req -x509 -newkey ec -nodes`.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBljCCAT2gAwIBAgIUU1D3/ZNwpLXVyGXTnbnGU95DzxYwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHcmVsYXktMTAgFw0yNjExMjIxODI5NTJaGA8yMTI2MTAyOTE4
Mjk1MlowEjEQMA4GA1UEAwwHcmVsYXktMTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABKGEl63wyP1MO65epk5dn8XorE8p3OC/PS4fUODPQvQH9n0YEzgyDaW9lc+l
GPmairP6+lqGqTYP0uwOJJ8MCBejbzBtMB0GA1UdDgQWBBS1x3nbPIPNULvWs3rP
sASlfnzKRTAfBgNVHSMEGDAWgBS1x3nbPIPNULvWs3rPsASlfnzKRTAPBgNVHRMB
Af8EBTADAQH/MBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQD
AgNHADBEAiAilDwHttd62CBb4lCocX1Zz46rTlPZwqsfrs4jtHM3cwIgSzb5yDOS
2ES9+CgzPg3ZGgyva1PS/1lWOITC0GHSlvs=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgR5w/0B13CQJ3u8oo
M7G08Gxc+isivCkrtSPgl/R0kMOhRANCAAShhJet8Mj9TDuuXqZOXZ/F6KxPKdzg
vz0uH1Dgz0L0B/Z9GBM4Mg2lvZXPpRj5moqz+vpahqk2D9LsDiSfDAgX
-----END PRIVATE KEY-----
"""

# --- Framing ---


def test_prefix_framing_is_a_zero_byte_and_the_id_big_endian() -> None:
    assert frame("prefix", Registered("s", 0x01020304)).prefix == b"\x00\x01\x02\x03\x04"


def test_header_framing_is_a_one_byte_and_the_guid_and_leaves_the_value_alone() -> None:
    framed = frame("header", Registered("s", 7, GUID.bytes))

    assert framed == Frame(b"", (("__value_schema_id", b"\x01" + GUID.bytes),))
    assert len(framed.headers[0][1]) == 17


def test_no_framing_adds_nothing() -> None:
    assert frame("none", Registered("s", 7, GUID.bytes)) == Frame()


def test_header_framing_without_a_guid_says_which_subject_and_what_to_do() -> None:
    with pytest.raises(GuidMissing, match=r"Subject chats-x.*RELAY_SCHEMA_FRAMING=prefix") as raised:
        frame("header", Registered("chats-x", 7))

    assert raised.value.subject == "chats-x"


@pytest.mark.parametrize("value", [b"", b"{}", b'{"a":1}', b" {}", b"\x00", b"\x00\x00\x00\x00"])
def test_a_value_without_prefix_is_left_as_it_is(value: bytes) -> None:
    assert unframed(value) == (None, value)


def test_a_prefix_is_taken_off_again() -> None:
    assert unframed(frame("prefix", Registered("s", 2**31 - 1)).prefix + b"{}") == (2**31 - 1, b"{}")


# --- Subjects ---


@dataclass
class Described:
    ce_type: str
    text: str


def described(ce_type: str, **more: object) -> Described:
    return Described(ce_type, json.dumps({"$schema": DRAFT_07, "title": ce_type, **more}))


def test_subjects_are_named_as_confluents_strategies_name_them() -> None:
    assert subject("topic-record", "chats", "message.saved") == "chats-message.saved"
    assert subject("record", "chats", "message.saved") == "message.saved"
    assert subject("topic", "chats", "message.saved") == "chats-value"


def test_every_shipped_schema_has_a_subject_of_its_own_on_one_topic() -> None:
    shipped = [*Schemas.load()]

    found = registrations("topic-record", [("chats", schema) for schema in shipped])

    assert [(it.subject, it.text) for it in found] == [(f"chats-{it.ce_type}", it.text) for it in shipped]
    assert [it.fingerprints for it in found] == [(fingerprint(it.text),) for it in shipped]


def test_a_record_subject_is_registered_once_for_all_topics() -> None:
    schema = described("message.saved")

    (found,) = registrations("record", [("one", schema), ("two", schema)])

    assert found.subject == "message.saved"


def test_a_topic_subject_holds_one_of_the_topics_schemas() -> None:
    saved, closed = described("message.saved"), described("session.closed")

    both, alone = registrations("topic", [("chats", saved), ("chats", closed), ("closed", closed)])

    assert both.subject == "chats-value"
    assert both.fingerprints == (fingerprint(saved.text), fingerprint(closed.text))
    document = json.loads(both.text)
    assert document["$schema"] == DRAFT_07
    assert document["oneOf"] == [json.loads(saved.text), json.loads(closed.text)]
    assert (alone.subject, alone.text) == ("closed-value", closed.text)


def test_a_fingerprint_is_of_what_a_schema_says_not_of_its_layout() -> None:
    assert fingerprint('{"a": 1, "b": [2]}') == fingerprint('{ "b":[2],\n"a":1 }')
    assert fingerprint('{"a": 1}') != fingerprint('{"a": 2}')


# --- The client, against a stub that answers as Confluent's registry does ---


async def test_registering_twice_gives_the_same_id_and_guid() -> None:
    async with stub_registry() as stub, Registry(stub.url) as registry:
        first = await registry.register("s", TEXT)
        second = await registry.register("s", json.dumps(json.loads(TEXT), indent=4))

        assert first == second
        assert first.guid is not None
        assert stub.subjects == {"s": [1]}


async def test_a_registry_without_guids_gives_none() -> None:
    async with stub_registry(guids=False) as stub, Registry(stub.url) as registry:
        assert (await registry.register("s", TEXT)).guid is None


async def test_a_new_subject_is_set_forward_transitive_before_its_first_version() -> None:
    async with stub_registry() as stub, faulty_proxy(stub.url) as proxy, Registry(proxy.url) as registry:
        await registry.register("s", TEXT)

        assert stub.settings == {"s": COMPATIBILITY}
        assert [line.partition("?")[0] for line in proxy.requests] == [
            "POST /subjects/s",
            "GET /config/s",
            "PUT /config/s",
            "POST /subjects/s/versions",
        ]


async def test_what_somebody_set_before_the_subject_was_made_stays() -> None:
    async with stub_registry() as stub, Registry(stub.url) as registry:
        stub.settings["s"] = "FULL"

        await registry.register("s", TEXT)

        assert stub.settings == {"s": "FULL"}


async def test_an_existing_subject_keeps_its_setting_and_its_lack_of_one() -> None:
    async with stub_registry() as stub, Registry(stub.url) as registry:
        stub.schemas, stub.subjects = [OTHER], {"s": [1]}

        await registry.register("s", TEXT)

        assert stub.subjects == {"s": [1, 2]}
        assert stub.settings == {}


async def test_a_failure_between_setting_and_registering_is_made_good_by_the_next_try() -> None:
    async with stub_registry() as stub, faulty_proxy(stub.url) as proxy, Registry(proxy.url) as registry:
        proxy.fail(Reset(), on="POST /subjects/s/versions")
        with pytest.raises(RegistryUnreachable):
            await registry.register("s", TEXT)
        assert stub.subjects == {}
        proxy.mend()

        await registry.register("s", TEXT)

        assert (stub.subjects, stub.settings) == ({"s": [1]}, {"s": COMPATIBILITY})


async def test_a_schema_that_was_registered_without_an_answer_is_registered_once() -> None:
    async with stub_registry() as stub, faulty_proxy(stub.url) as proxy, Registry(proxy.url) as registry:
        proxy.fail(Cut(after=20), on="POST /subjects/s/versions")
        with pytest.raises(RegistryUnreachable):
            await registry.register("s", TEXT)
        proxy.mend()

        assert (await registry.register("s", TEXT)).id == 1
        assert stub.subjects == {"s": [1]}


async def test_looking_up_finds_what_is_there_and_makes_nothing() -> None:
    async with stub_registry() as stub, Registry(stub.url) as registry:
        with pytest.raises(SchemaMissing, match="Subject s") as no_subject:
            await registry.look_up("s", TEXT)
        assert (stub.subjects, stub.settings) == ({}, {})
        registered = await registry.register("s", TEXT)

        assert await registry.look_up("s", TEXT) == registered
        with pytest.raises(SchemaMissing) as no_schema:
            await registry.look_up("s", OTHER)
        assert (no_subject.value.new_subject, no_schema.value.new_subject) == (True, False)


async def test_subjects_are_listed_in_order() -> None:
    async with stub_registry() as stub, Registry(stub.url) as registry:
        stub.subjects = {"b": [1], "a": [1]}

        assert await registry.subjects() == ["a", "b"]


async def test_a_check_changes_nothing() -> None:
    async with stub_registry() as stub, faulty_proxy(stub.url) as proxy, Registry(proxy.url) as registry:
        stub.schemas, stub.subjects, stub.incompatible = [OTHER], {"s": [1]}, {TEXT}

        verdicts = [await registry.check("s", TEXT), await registry.check("s", OTHER), await registry.check("t", TEXT)]

        assert [it.standing for it in verdicts] == [Standing.INCOMPATIBLE, Standing.REGISTERED, Standing.NEW]
        assert "PROPERTY_REMOVED" in verdicts[0].text
        assert (stub.subjects, stub.settings, stub.schemas) == ({"s": [1]}, {}, [OTHER])
        assert not [line for line in proxy.requests if line.startswith("PUT") or "/s/versions?" in line[:22]]


@pytest.mark.parametrize(("setting", "compared"), [("FORWARD_TRANSITIVE", ["1", "2"]), ("FORWARD", ["latest"])])
async def test_a_registry_that_compares_one_version_at_a_time_is_asked_for_those_that_count(
    setting: str, compared: list[str]
) -> None:
    async with stub_registry(compares_all_versions=False) as stub, Registry(stub.url) as registry:
        stub.schemas, stub.subjects, stub.settings = [OTHER, "{}"], {"s": [1, 2]}, {"s": setting}

        assert (await registry.check("s", TEXT)).standing is Standing.COMPATIBLE
        assert stub.compared == compared
        stub.incompatible = {TEXT}
        verdict = await registry.check("s", TEXT)

        assert verdict.standing is Standing.INCOMPATIBLE
        assert f"version {compared[0]}: PROPERTY_REMOVED" in verdict.text


async def test_the_password_is_asked_for_at_each_request() -> None:
    answers = iter([None, basic("relay", "käse:1"), bearer("t0ken")])
    async with stub_registry() as stub, Registry(stub.url, authorization=lambda: next(answers)) as registry:
        for _ in range(3):
            await registry.subjects()

        assert stub.authorizations == [None, "Basic cmVsYXk6a8Okc2U6MQ==", "Bearer t0ken"]


async def test_a_registrys_certificate_is_checked_against_the_given_ones(tmp_path: Path) -> None:
    files = tmp_path / "registry.crt", tmp_path / "registry.key"
    for file, pem in zip(files, (CERTIFICATE, KEY), strict=True):
        file.write_text(pem)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(*files)
    trusting = ssl.create_default_context(cafile=files[0])

    async with stub_registry(served) as stub:
        async with Registry(stub.url, ssl_context=trusting) as registry:
            assert (await registry.register("s", TEXT)).id == 1
        async with Registry(stub.url) as registry:
            with pytest.raises(RegistryUnreachable, match="certificate verify failed"):
                await registry.register("s", TEXT)


# --- Failures ---


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, None, SchemaRefused),
        (401, 40101, RegistryRefused),
        (403, 40301, RegistryRefused),
        (404, None, RegistryNotThere),
        (405, None, RegistryNotThere),
        (409, 409, SchemaIncompatible),
        (409, 40901, SchemaIncompatible),
        (413, None, SchemaRefused),
        (422, 42201, SchemaRefused),
        (422, 42205, RegistryRefused),
        (429, None, RegistryFailed),
        (500, 50001, RegistryFailed),
        (503, None, RegistryFailed),
    ],
)
async def test_each_refusal_has_its_error_which_names_subject_status_and_reason(
    failing: FaultyProxy, status: int, code: int | None, expected: type[RegistryError]
) -> None:
    failing.fail(Answer(status, json.dumps({"error_code": code, "message": "that is why"}).encode()))

    async with Registry(failing.url) as registry:
        with pytest.raises(RegistryError, match=f"Subject chats-x: .*{status}: that is why") as raised:
            await registry.register("chats-x", TEXT)

    assert type(raised.value) is expected
    assert raised.value.subject == "chats-x"
    assert len(failing.requests) == 1


async def test_a_proxys_page_is_no_answer(failing: FaultyProxy) -> None:
    async with Registry(failing.url) as registry:
        for body in (b"<html>Welcome!</html>", b"[]", b"{}", b'{"id": "7"}', b'{"id": -1}', b'{"id": 1, "guid": "x"}'):
            failing.fail(Answer(200, body))
            with pytest.raises(RegistryFailed, match="without a schema id"):
                await registry.register("s", TEXT)
        with pytest.raises(RegistryFailed, match="list of subjects"):
            await registry.subjects()


@pytest.mark.parametrize(
    "body", [b'{"error_code": [40401]}', b'{"error_code": {}, "message": {}}', b'{"error_code": "x"}']
)
async def test_an_error_of_another_form_counts_by_its_status(failing: FaultyProxy, body: bytes) -> None:
    failing.fail(Answer(503, body))

    async with Registry(failing.url) as registry:
        with pytest.raises(RegistryFailed, match="503"):
            await registry.register("s", TEXT)


@pytest.mark.parametrize("messages", [b"5", b"null", b"[]", b'{"a": 1}'])
async def test_an_objection_without_messages_is_one(failing: FaultyProxy, messages: bytes) -> None:
    async with Registry(failing.url) as registry:
        await registry.register("s", TEXT)
        failing.fail(Answer(200, b'{"is_compatible": false, "messages": %b}' % messages), on="POST /compatibility")
        verdict = await registry.check("s", OTHER)

    assert (verdict.standing, verdict.text) == (
        Standing.INCOMPATIBLE,
        "would be refused: the registry does not say why",
    )


async def test_a_redirect_is_not_followed_and_named(failing: FaultyProxy) -> None:
    failing.fail(Answer(301, headers=(("Location", "https://elsewhere.example/subjects/s"),)))

    async with Registry(failing.url, authorization=lambda: basic("relay", "secret")) as registry:
        with pytest.raises(RegistryFailed, match=r"301: https://elsewhere\.example"):
            await registry.register("s", TEXT)

    assert len(failing.requests) == 1


async def test_a_long_reason_is_cut(failing: FaultyProxy) -> None:
    failing.fail(Answer(409, json.dumps({"message": "why\n" * 1000}).encode()))

    async with Registry(failing.url) as registry:
        with pytest.raises(SchemaIncompatible) as raised:
            await registry.register("s", TEXT)

    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", [Reset(), Reset(after=40), Cut(after=0), Cut(after=40)])
async def test_a_broken_connection_is_an_unreachable_registry(failing: FaultyProxy, fault: Reset | Cut) -> None:
    failing.fail(fault)

    async with Registry(failing.url) as registry:
        with pytest.raises(RegistryUnreachable, match="Subject s"):
            await registry.register("s", TEXT)


async def test_a_registry_that_refuses_connections_is_unreachable_until_it_listens_again(failing: FaultyProxy) -> None:
    await failing.refuse()
    async with Registry(failing.url) as registry:
        with pytest.raises(RegistryUnreachable, match=f"127.0.0.1:{failing.port}"):
            await registry.register("s", TEXT)
        await failing.listen()

        assert (await registry.register("s", TEXT)).id == 1


async def test_a_registry_that_never_answers_is_given_up_in_time(failing: FaultyProxy) -> None:
    failing.fail(Hold())

    async with Registry(failing.url, timeout=0.05) as registry:
        with pytest.raises(RegistryUnreachable, match=r"no answer within 0\.05 s"):
            await registry.register("s", TEXT)


async def test_a_slow_registry_is_waited_for(failing: FaultyProxy) -> None:
    hold = Hold()
    failing.fail(hold)
    hold.release.set()

    async with Registry(failing.url) as registry:
        assert (await registry.register("s", TEXT)).id == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1/x", "http://no.such.host.invalid"])
async def test_a_registry_that_is_not_there_is_unreachable(url: str) -> None:
    async with Registry(url) as registry:
        with pytest.raises(RegistryUnreachable, match=url):
            await registry.register("s", TEXT)


@pytest.mark.parametrize("url", ["", "nonsense", "http://", "localhost:8081", "ftp://localhost", "/apis"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="must be a URL"):
        Registry(url)


async def test_a_password_in_the_url_is_in_no_message() -> None:
    async with Registry("http://relay:secret@127.0.0.1:1/") as registry:
        assert registry.url == UNREACHABLE
        with pytest.raises(RegistryUnreachable) as raised:
            await registry.register("s", TEXT)

    assert "secret" not in str(raised.value)


@pytest.fixture
async def failing(stub: StubRegistry) -> AsyncIterator[FaultyProxy]:
    """Yield a proxy in front of the stub."""
    async with faulty_proxy(stub.url) as proxy:
        yield proxy


@pytest.fixture
async def stub() -> AsyncIterator[StubRegistry]:
    async with stub_registry() as stub:
        yield stub
