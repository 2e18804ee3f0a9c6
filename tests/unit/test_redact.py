import json
from typing import Any

import orjson
import pytest

from relay.redact import REDACTED, Redaction


def redacted(payload: dict[str, Any], *pointers: str) -> Any:
    return orjson.loads(Redaction(pointers).apply(payload))


def test_the_value_at_a_pointer_is_replaced() -> None:
    body = {"_id": "c", "visitor": {"token": "secret", "name": "Ada"}}
    assert redacted(body, "/visitor/token") == {"_id": "c", "visitor": {"token": "[redacted]", "name": "Ada"}}


@pytest.mark.parametrize("value", [None, 1, True, ["secret"], {"a": {"b": "secret"}}])
def test_a_value_of_any_kind_is_replaced_as_a_whole(value: object) -> None:
    assert redacted({"visitor": value}, "/visitor") == {"visitor": REDACTED}


def test_a_star_is_every_item_of_an_array() -> None:
    body = {"messages": [{"navigation": {"token": "a"}}, {"msg": "Hi"}, {"navigation": {"token": "b"}}, None, "text"]}
    assert redacted(body, "/messages/*/navigation/token")["messages"] == [
        {"navigation": {"token": REDACTED}},
        {"msg": "Hi"},
        {"navigation": {"token": REDACTED}},
        None,
        "text",
    ]
    assert redacted({"tags": ["a", "b"]}, "/tags/*") == {"tags": [REDACTED, REDACTED]}
    assert redacted({"a": [["x", "y"], ["z"]]}, "/a/*/*") == {"a": [[REDACTED, REDACTED], [REDACTED]]}


def test_a_number_is_one_item_of_an_array() -> None:
    assert redacted({"tags": ["a", "b"]}, "/tags/1") == {"tags": ["a", REDACTED]}
    assert redacted({"tags": ["a", "b"]}, "/tags/2", "/tags/-1", "/tags/-", "/tags/x") == {"tags": ["a", "b"]}


def test_a_star_and_a_number_are_names_in_an_object() -> None:
    assert redacted({"*": "a", "1": "b", "c": "d"}, "/*", "/1") == {"*": REDACTED, "1": REDACTED, "c": "d"}


def test_what_is_not_there_stays_away() -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"visitor": None},
        {"visitor": "text"},
        {"visitor": []},
        {"visitor": {"name": "Ada"}},
    ]
    for body in bodies:
        assert redacted(dict(body), "/visitor/token") == body


def test_escaped_steps_are_names() -> None:
    assert redacted({"a/b": 1, "m~n": 2, "~1": 3, "": 4}, "/a~1b", "/m~0n", "/~01", "/") == {
        "a/b": REDACTED,
        "m~n": REDACTED,
        "~1": REDACTED,
        "": REDACTED,
    }


def test_several_pointers_may_meet() -> None:
    body = {"visitor": {"token": "a", "email": [{"address": "b"}]}}
    assert redacted(body, "/visitor/token", "/visitor/email/*/address", "/visitor/token") == {
        "visitor": {"token": REDACTED, "email": [{"address": REDACTED}]}
    }
    assert redacted({"visitor": {"token": "a"}}, "/visitor", "/visitor/token") == {"visitor": REDACTED}


@pytest.mark.parametrize("pointer", ["", "visitor", "visitor/token", "#/visitor", "$.visitor", " /visitor"])
def test_what_is_no_json_pointer_is_refused(pointer: str) -> None:
    with pytest.raises(ValueError, match="JSON pointer"):
        Redaction([pointer])


def test_without_pointers_there_is_nothing_to_do() -> None:
    assert not Redaction([])
    assert Redaction(["/a"])


@pytest.mark.parametrize("label", ['"half \\ud83d"', "1" * 30, '{"\\ude00":1}'])
def test_json_that_orjson_cannot_write_is_written_all_the_same(label: str) -> None:
    payload = json.loads(f'{{"label":{label},"visitor":{{"token":"secret"}}}}')
    written = Redaction(["/visitor/token"]).apply(payload)
    assert b"secret" not in written
    assert json.loads(written) == json.loads(f'{{"label":{label},"visitor":{{"token":"{REDACTED}"}}}}')


def test_the_order_of_keys_stays_and_no_space_is_added() -> None:
    assert Redaction(["/b"]).apply({"c": 1, "b": 2, "a": [1, 2]}) == b'{"c":1,"b":"[redacted]","a":[1,2]}'
