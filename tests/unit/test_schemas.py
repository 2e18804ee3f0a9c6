import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import SchemasInvalid
from relay.event import EVENT_TYPES
from relay.schemas import DRAFT_07, Schemas

REPOSITORY = Path(__file__).parents[2]
CASES = REPOSITORY / "tests" / "schemas"
SHIPPED = Schemas.load()
TYPES = {schema.name: schema.rocketchat_type for schema in SHIPPED}
DOCUMENTS: dict[str, dict[str, Any]] = {schema.name: json.loads(schema.text) for schema in SHIPPED}
VALID = sorted(CASES.glob("*/valid/*.json"))
INVALID = sorted(CASES.glob("*/invalid/*.json"))

# What is said of the files in tests/schemas/*/invalid, each of which is named after its one fault.
FAULTS = {
    "agent-a-string": "/agent: type (null or object expected)",
    "agent-custom-fields-an-array": "/agent/customFields: type (null or object expected)",
    "another-type": "/type: const",
    "attachments-an-object": "/messages/0/attachments: type (null or array expected)",
    "closed-at-a-number": "/closedAt: type (null or string expected)",
    "closed-by-a-string": "/closedBy: type (null or object expected)",
    "closer-an-object": "/closer: type (null or string expected)",
    "closing-message-a-string": "/messages/0/closingMessage: type (null or boolean expected)",
    "created-at-a-number": "/createdAt: type (null or string expected)",
    "department-a-number": "/departmentId: type (null or string expected)",
    "department-an-object": "/departmentId: type (null or string expected)",
    "email-an-array": "/visitor/email: type (string expected)",
    "email-null": "/visitor/email: type (string expected)",
    "file-a-string": "/messages/0/file: type (null or object expected)",
    "file-size-a-string": "/messages/0/file/size: type (null or number expected)",
    "file-upload-a-string": "/messages/0/fileUpload: type (null or object expected)",
    "half-an-emoji-and-no-time": "/messages/0/ts: required",
    "id-a-number": "/_id: type (string expected)",
    "id-empty": "/_id: minLength",
    "id-null": "/_id: type (string expected)",
    "label-a-number": "/label: type (null or string expected)",
    "message-a-string": "/messages/0: type (object expected)",
    "message-an-array": "/message: type (string expected)",
    "message-author-a-string": "/messages/0/u: type (null or object expected)",
    "message-blocks-a-string": "/messages/0/blocks: type (null or array expected)",
    "message-null": "/messages/0: type (object expected)",
    "message-text-an-array": "/messages/0/msg: type (null or string expected)",
    "message-time-a-number": "/messages/0/ts: type (string expected)",
    "message-time-null": "/messages/0/ts: type (string expected)",
    "message-without-time": "/messages/0/ts: required",
    "message-without-username": "/messages/0/username: required",
    "messages-not-an-array": "/messages: type (array expected)",
    "messages-null": "/messages: type (array expected)",
    "missing-email": "/visitor/email: required",
    "missing-id": "/_id: required",
    "missing-message": "/message: required",
    "missing-messages": "/messages: required",
    "missing-type": "/type: required",
    "missing-visitor": "/visitor: required",
    "navigation-location-a-string": "/messages/0/navigation/page/location: type (null or object expected)",
    "no-message": "/messages: minItems",
    "not-an-object": "the body: type (object expected)",
    "old-department-a-number": "/oldDepartmentId: type (null or string expected)",
    "old-served-by-an-array": "/oldServedBy: type (null or object expected)",
    "second-message-a-number": "/messages/1: type (object expected)",
    "sent-at-a-number": "/sentAt: type (null or string expected)",
    "served-by-a-string": "/servedBy: type (null or object expected)",
    "served-by-time-a-number": "/servedBy/ts: type (null or string expected)",
    "tag-an-object": "/tags/1: type (null or string expected)",
    "tags-a-string": "/tags: type (null or array expected)",
    "visitor-a-string": "/visitor: type (object expected)",
    "visitor-email-address-a-number": "/visitor/email/1/address: type (null or string expected)",
    "visitor-email-an-object": "/visitor/email: type (null or string or array expected)",
    "visitor-email-of-strings": "/visitor/email/0: type (null or object expected)",
    "visitor-null": "/visitor: type (object expected)",
    "visitor-phone-a-number": "/visitor/phone: type (null or string or array expected)",
    "visitor-phone-number-a-number": "/visitor/phone/0/phoneNumber: type (null or string expected)",
    "visitor-token-an-object": "/visitor/token: type (null or string expected)",
    "visitor-without-id": "/visitor/_id: required",
    "visitor-without-username": "/visitor/username: required",
}


def case_id(path: Path) -> str:
    return f"{path.parts[-3]}/{path.stem}"


def judge_file(path: Path) -> str | None:
    # The standard library also reads lone surrogates and integers of any size.
    return SHIPPED.judge(TYPES[path.parts[-3]], json.loads(path.read_text()))


@pytest.mark.parametrize("path", VALID, ids=case_id)
def test_what_rocket_chat_sends_is_valid(path: Path) -> None:
    assert judge_file(path) is None


@pytest.mark.parametrize("path", INVALID, ids=case_id)
def test_an_invalid_payload_is_told_by_place_and_rule(path: Path) -> None:
    assert judge_file(path) == FAULTS[path.stem]


def test_every_schema_has_valid_and_invalid_cases_and_every_case_a_schema() -> None:
    assert {path.parts[-3] for path in VALID} == {path.parts[-3] for path in INVALID} == set(TYPES)
    assert {path.stem for path in INVALID} == set(FAULTS)


# --- The shipped files ---


def properties(node: object, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        for name, schema in node.get("properties", {}).items():
            yield f"{pointer}/{name}", schema
            yield from properties(schema, f"{pointer}/{name}")
        yield from properties(node.get("items"), f"{pointer}/*")


def nodes(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)


def test_there_is_one_schema_for_each_type_of_event() -> None:
    assert {schema.rocketchat_type: schema.ce_type for schema in SHIPPED} == {
        event_type.name: event_type.ce_type for event_type in EVENT_TYPES.values()
    }
    assert len(SHIPPED) == len(TYPES) == len(list((REPOSITORY / "schemas").glob("*.json"))) == 9


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_is_named_after_its_event(name: str) -> None:
    document, schema = DOCUMENTS[name], SHIPPED.get(TYPES[name])

    assert schema is not None
    assert document["title"] == schema.ce_type
    assert document["title"].removeprefix("chat.rocket.omnichannel.").replace(".", "-") == name
    assert document["$id"] == schema.uri == f"urn:rocketchat-kafka-relay:{name}:v1"
    assert schema.text.encode() == (REPOSITORY / "schemas" / f"{name}.json").read_bytes()


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_schema_is_valid_draft_07(document: dict[str, Any]) -> None:
    assert document["$schema"] == DRAFT_07
    jsonschema_rs.meta.validate(document)


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_property_is_described(document: dict[str, Any]) -> None:
    assert document["description"]
    assert [pointer for pointer, schema in properties(document) if not schema.get("description")] == []


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_schema_is_open_and_self_contained(document: dict[str, Any]) -> None:
    closing = {"additionalProperties", "patternProperties", "propertyNames", "maxProperties", "additionalItems", "$ref"}

    assert [node for node in nodes(document) if closing & set(node)] == []


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_whatever_is_not_required_may_be_null(document: dict[str, Any]) -> None:
    required = {
        f"{pointer}/{name}"
        for pointer, node in [("", document), *properties(document), *item_schemas(document)]
        for name in node.get("required", ())
    }
    refusing = {pointer for pointer, schema in properties(document) if "null" not in schema.get("type", "null")}

    assert refusing == required


def item_schemas(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{pointer}/*", schema["items"]) for pointer, schema in properties(document) if "items" in schema)


def test_what_several_schemas_hold_is_the_same_in_each() -> None:
    chats = [document for name, document in DOCUMENTS.items() if name != "offline-message-left"]
    seen: dict[str, dict[str, Any]] = {}
    for document in chats:
        for name, schema in document["properties"].items():
            # What a message holds is the same; which ones come is not.
            shared = schema["items"] if name == "messages" else schema
            assert name == "type" or seen.setdefault(name, shared) == shared


# --- The judge ---

MARK = "s3cr3t"
MARKED_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.builds((MARK + "{}").format, st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.builds((MARK + "{}").format, st.characters()), inner, max_size=3)
    ),
    max_leaves=8,
)
SAMPLES = [(TYPES[path.parts[-3]], path.read_text()) for path in VALID]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@settings(deadline=None)
@given(sample=st.sampled_from(SAMPLES), data=st.data())
def test_a_detail_never_holds_text_of_the_payload(sample: tuple[str, str], data: st.DataObject) -> None:
    rocketchat_type, text = sample
    payload = json.loads(text)
    container, key = data.draw(st.sampled_from(list(places(payload))))
    container[key] = data.draw(MARKED_JSON)

    assert MARK not in (SHIPPED.judge(rocketchat_type, payload) or "")


@settings(deadline=None)
@given(rocketchat_type=st.sampled_from(list(TYPES.values())), payload=MARKED_JSON)
def test_any_json_is_judged_without_an_exception(rocketchat_type: str, payload: object) -> None:
    detail = SHIPPED.judge(rocketchat_type, payload)

    assert detail is not None
    assert MARK not in detail


def write_schema(folder: Path, name: str, **keywords: object) -> Path:
    head = {
        "$schema": DRAFT_07,
        "$id": f"urn:test:{name}",
        "title": f"test.{name}",
        "properties": {"type": {"const": "Custom"}},
    }
    path = folder / f"{name}.json"
    path.write_bytes(orjson.dumps(head | keywords))
    return path


def judge_with(tmp_path: Path, schema: dict[str, object], payload: object) -> str | None:
    write_schema(tmp_path, "custom", allOf=[schema])
    return Schemas.load(tmp_path).judge("Custom", payload)


@pytest.mark.parametrize(
    ("schema", "payload", "detail"),
    [
        ({"additionalProperties": {"type": "null"}}, {"secret": 1}, "/*: type (null expected)"),
        ({"patternProperties": {"^s": {"type": "null"}}}, {"secret": 1}, "/*: type (null expected)"),
        ({"propertyNames": {"maxLength": 2}}, {"secret": 1}, "the body: propertyNames"),
        (
            {"properties": {"a/b~c": {"items": {"type": "null"}}}},
            {"a/b~c": [None, "x"]},
            "/a~1b~0c/1: type (null expected)",
        ),
        ({"properties": {"a": {"additionalProperties": {"enum": [1]}}}}, {"a": {"secret": 2}}, "/a/*: enum"),
        ({"properties": {"a": {"format": "date-time"}}}, {"a": "secret"}, None),
        ({"properties": {"a": {"pattern": "^.$"}}}, {"a": "\ud83d"}, None),
        ({"properties": {"a": {"pattern": "^.$"}}}, {"a": "\ud83d\ud83d"}, "/a: pattern"),
    ],
)
def test_a_detail_names_only_what_the_schema_names(
    tmp_path: Path, schema: dict[str, object], payload: object, detail: str | None
) -> None:
    assert judge_with(tmp_path, schema, payload) == detail


def test_a_long_pointer_is_cut(tmp_path: Path) -> None:
    name = "n" * 5000

    detail = judge_with(tmp_path, {"properties": {name: {"type": "null"}}}, {name: 1})

    assert detail is not None
    assert len(detail) < 300


def nested(levels: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner]
    return inner


def test_deep_nesting_is_judged() -> None:
    payload = json.loads((CASES / "message-saved" / "valid" / "Message.json").read_text())

    assert SHIPPED.judge("Message", payload | {"crmData": nested(900)}) is None
    assert SHIPPED.judge("Message", payload | {"label": nested(900)}) == "the body: not judged, nested too deeply"
    assert SHIPPED.judge("Message", payload | {"label": nested(100)}) == "/label: type (null or string expected)"


def test_a_type_without_a_schema_is_not_valid() -> None:
    assert SHIPPED.get("Unheard") is None
    assert SHIPPED.judge("Unheard", {}) == "/type: no schema for it"


# --- Further files ---


def test_a_further_file_adds_a_type(tmp_path: Path) -> None:
    write_schema(tmp_path, "custom", required=["_id"])

    schemas = Schemas.load(tmp_path)

    schema = schemas.get("Custom")
    assert schema is not None
    assert (schema.name, schema.ce_type, schema.uri) == ("custom", "test.custom", "urn:test:custom")
    assert len(schemas) == len(SHIPPED) + 1
    assert schemas.judge("Custom", {}) == "/_id: required"
    assert schemas.types.keys() - SHIPPED.types.keys() == {"Custom"}
    assert schemas.types["Custom"].ce_type == "test.custom"


def test_a_further_file_replaces_the_shipped_one_of_its_type(tmp_path: Path) -> None:
    write_schema(tmp_path, "ours", **DOCUMENTS["session-queued"] | {"required": ["departmentId"]})

    schemas = Schemas.load(tmp_path)

    assert len(schemas) == len(SHIPPED)
    assert schemas.judge("LivechatSessionQueued", {}) == "/departmentId: required"


def test_only_visible_json_files_count(tmp_path: Path) -> None:
    # Kubernetes mounts a ConfigMap with hidden entries beside the files.
    for name in ("..data", "README.md", ".hidden.json"):
        (tmp_path / name).write_text("no schema")

    assert len(Schemas.load(tmp_path)) == len(SHIPPED)


def test_every_fault_of_every_file_is_told_at_once(tmp_path: Path) -> None:
    faults = {
        write_schema(tmp_path, "a-const", properties={}): '"properties.type.const" is not the name of a type of event',
        write_schema(tmp_path, "a-draft", **{"$schema": "https://json-schema.org/draft/2020-12/schema"}): (
            f'"$schema" is not "{DRAFT_07}"'
        ),
        write_schema(tmp_path, "a-id", **{"$id": ""}): '"$id" is missing',
        write_schema(tmp_path, "a-keyword", properties={"type": {"const": "Custom", "minLength": -1}}): (
            "not a schema: #/properties/type/minLength: -1 is less than the minimum of 0"
        ),
        write_schema(tmp_path, "a-title", title="a b"): ('"title" is not a ce_type: letters, digits, ".", "_" and "-"'),
        write_schema(tmp_path, "a-type", properties={"type": {"const": "unknown"}}): (
            '"properties.type.const" is "unknown", which stands for all types without a schema'
        ),
        write_schema(tmp_path, "a-unknown", title="chat.rocket.omnichannel.unknown"): (
            '"title" is "chat.rocket.omnichannel.unknown", which stands for all types without a schema'
        ),
        write_schema(tmp_path, "b-1"): None,
        write_schema(tmp_path, "b-2"): "b-1.json is for Custom too",
        write_schema(tmp_path, "c", title="test.b-1", properties={"type": {"const": "Other"}}): (
            '"test.b-1" is the "title" for Custom'
        ),
        write_schema(tmp_path, "d", properties={"type": {"const": "Message"}}): (
            'the "title" for Message is "chat.rocket.omnichannel.message.saved"'
        ),
    }
    (tmp_path / "a-array.json").write_text("[]")
    (tmp_path / "a-folder.json").mkdir()
    (tmp_path / "a-text.json").write_text("{")

    with pytest.raises(SchemasInvalid) as raised:
        Schemas.load(tmp_path)

    told = dict(
        problem.removeprefix(f"RELAY_SCHEMAS_DIR: {tmp_path}/").split(": ", 1) for problem in raised.value.problems
    )
    assert told.pop("a-text.json").startswith("not JSON: ")
    assert told == {path.name: fault for path, fault in faults.items() if fault} | {
        "a-array.json": "not a JSON object",
        "a-folder.json": "Is a directory",
    }


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SchemasInvalid, match=r"RELAY_SCHEMAS_DIR: .*/nowhere: No such file or directory"):
        Schemas.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("http://127.0.0.1:9/x.json", "Retrieval is disabled"),
        ("other.json", "Failed to resolve 'other.json'"),
        ("#/definitions/missing", "'/definitions/missing' does not exist"),
    ],
)
def test_a_reference_out_of_the_file_is_refused_and_not_fetched(tmp_path: Path, reference: str, fault: str) -> None:
    write_schema(tmp_path, "custom", allOf=[{"$ref": reference}])

    with pytest.raises(SchemasInvalid, match=rf"custom\.json: not a schema: .*{fault}"):
        Schemas.load(tmp_path)


def test_an_installed_package_brings_its_schemas(tmp_path: Path) -> None:
    # As the wheel lays them out; see `force-include` in pyproject.toml.
    shutil.copytree(REPOSITORY / "schemas", tmp_path / "relay" / "_schemas")
    for module in ("__init__", "errors", "event", "schemas"):
        shutil.copy(REPOSITORY / "relay" / f"{module}.py", tmp_path / "relay")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from relay import schemas\n"
        "print(schemas.__file__, *sorted(schema.name for schema in schemas.Schemas.load()))"
    )

    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path)

    assert output.stdout.split() == [str(tmp_path / "relay" / "schemas.py"), *sorted(TYPES)]
