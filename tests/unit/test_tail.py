import json
import uuid

import pytest
from aiokafka import ConsumerRecord

from relay.dev.tail import as_json, line, schema_id

GUID = uuid.UUID("89791762-2336-4186-9674-299b90a802e2")
BODY = b'{"_id":"c"}'


def record(value: bytes | None, *headers: tuple[str, bytes | None]) -> ConsumerRecord[bytes, bytes]:
    given = (("ce_type", b"chat.rocket.omnichannel.message.saved"), *headers)
    return ConsumerRecord("chats", 0, 7, 0, 0, b"c", value, None, 1, len(value or b""), given)


@pytest.mark.parametrize(
    ("framed", "id_"),
    [
        (record(BODY), None),
        (record(b"\x00\x00\x00\x01\x02" + BODY), 258),
        (record(BODY, ("__value_schema_id", b"\x01" + GUID.bytes)), str(GUID)),
    ],
    ids=["none", "prefix", "header"],
)
def test_a_value_is_shown_as_json_with_the_id_of_its_schema_however_it_is_framed(
    framed: ConsumerRecord[bytes, bytes], id_: int | str | None
) -> None:
    assert schema_id(framed) == id_
    shown = json.loads(as_json(framed))
    assert (shown["value"], shown["schema_id"]) == ({"_id": "c"}, id_)
    assert line(framed).endswith("0@7" if id_ is None else f"0@7  schema {id_}")


def test_what_is_no_json_is_shown_as_text() -> None:
    assert json.loads(as_json(record(b"{oops")))["value"] == "{oops"
    assert json.loads(as_json(record(None)))["value"] is None


def test_a_header_of_another_client_s_form_is_shown_as_hexadecimal() -> None:
    assert schema_id(record(BODY, ("__value_schema_id", b"\x07\xff"))) == "07ff"


def test_headers_without_a_value_are_no_obstacle() -> None:
    shown = record(BODY, ("ce_source", None), ("__value_schema_id", None))
    assert line(shown).endswith("0@7")
    assert json.loads(as_json(shown))["headers"] == {"ce_type": "chat.rocket.omnichannel.message.saved"}


def test_a_dead_letter_shows_the_reason_and_the_place_in_the_body_and_a_mark_the_letter_it_is_of() -> None:
    letter = record(BODY, ("relay_error_reason", b"schema"), ("relay_error_detail", b"/visitor: required"))
    assert line(letter).endswith("0@7  schema: /visitor: required")
    assert line(record(b"{}", ("relay_replayed", b"0@3"))).endswith("0@7  replayed: 0@3")
