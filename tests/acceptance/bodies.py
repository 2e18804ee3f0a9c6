"""Bodies for deliveries: the samples of every Rocket.Chat, and small made-up ones."""

import json
import uuid
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_TEST_DELIVERY = "WebhookTest.LivechatSession.json"


def samples(kind: str = "valid") -> dict[str, bytes]:
    """The sample bodies, each once, by schema and file name; without the one that "Send test" sends."""
    found = sorted((_ROOT / "tests" / "schemas").glob(f"*/{kind}/*.json"))
    by_body = {path.read_bytes(): f"{path.parts[-3]}/{path.name}" for path in found if path.name != _TEST_DELIVERY}
    assert by_body
    return {name: body for body, name in by_body.items()}


def send_test() -> bytes:
    """What Rocket.Chat's button "Send test" sends."""
    (path,) = (_ROOT / "tests" / "schemas").rglob(_TEST_DELIVERY)
    return path.read_bytes()


def schema_uris() -> dict[str, str]:
    """The `$id` of each schema by the Rocket.Chat type that it is for."""
    schemas = [json.loads(path.read_bytes()) for path in (_ROOT / "schemas").glob("*.json")]
    return {schema["properties"]["type"]["const"]: schema["$id"] for schema in schemas}


def new_chat() -> str:
    """The id of a chat that no other test has."""
    return uuid.uuid4().hex[:17]


def message(chat: str, number: int = 1, *, text: str = "Hello") -> bytes:
    """A `Message` that is as small as its schema lets it be, unless *text* is long."""
    at = "2026-11-20T09:00:01.120Z"
    visitor = {"_id": "v1", "token": "visitor-token", "name": "Ada Visitor", "username": "guest-1"}
    said = {"_id": f"{chat}-{number}", "username": "guest-1", "msg": text, "ts": at}
    return json.dumps({"_id": chat, "visitor": visitor, "type": "Message", "messages": [said]}).encode()


def of_type(type_: str, chat: str) -> bytes:
    """A body of one of the types that can do without messages."""
    visitor = {"_id": "v1", "name": "Ada Visitor", "username": "guest-1"}
    return json.dumps({"_id": chat, "visitor": visitor, "type": type_, "messages": []}).encode()
