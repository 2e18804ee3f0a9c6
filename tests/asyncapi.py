"""Makes `schemas/asyncapi.yaml` from what the relay is made of: its schemas, types, headers, settings and samples."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import relay
from relay.config import Settings
from relay.event import (
    EVENT_TYPES,
    OFFLINE_MESSAGE,
    UNKNOWN_TYPE,
    DeadLetterReason,
    Delivery,
    Event,
    EventType,
    event_type,
)
from relay.framing import SCHEMA_ID_HEADER
from relay.operate.letters import REPLAYED_HEADER, Letter, mark
from relay.reader import Found
from relay.record import Record, RecordMaker, Topics
from relay.schemas import Schema, Schemas

Json = dict[str, Any]

DOCUMENT = Path(__file__).parent.parent / "schemas" / "asyncapi.yaml"
SAMPLES = Path(__file__).parent / "schemas"

#: Samples of which these are in the name are of former versions of Rocket.Chat.
_FORMER = (".v5", "until", "pre-", "crmdata")
#: When the samples happened that do not say it.
_HAPPENED = "2026-11-20T09:00:00.412Z"
_BINDING = {"bindingVersion": "0.5.0"}

#: What each header of a record is; `Headers` of relay/record.py.
HEADERS: dict[str, Json] = {
    "ce_specversion": {"const": "1.0", "description": "The version of CloudEvents."},
    "ce_id": {
        "type": "string",
        "pattern": r"^[0-9a-f]{64}(\.[0-9]+)?$",
        "description": "SHA-256 of workspace, line feed and body: the same for every retry of one delivery. "
        "`.2`, `.3`… follow for a genuine repeat of an identical body. Unique together with `ce_source`.",
    },
    "ce_source": {
        "type": "string",
        "pattern": "^/rocketchat/.+",
        "description": "`/rocketchat/{workspace}`; the workspace is `default` where there is only one.",
    },
    "ce_type": {"type": "string", "description": "What happened."},
    "ce_subject": {"type": "string", "description": "The chat's `_id`."},
    "ce_time": {
        "type": "string",
        "format": "date-time",
        "description": "When it happened, where the body says so; else when it was received.",
    },
    "ce_dataschema": {"type": "string", "description": "The `$id` of its schema."},
    "content-type": {"const": "application/json", "description": "What the value is, without its framing."},
    "relay_sequence": {
        "type": "string",
        "pattern": "^[0-9]+$",
        "description": "Grows by arrival within one relay.",
    },
    "relay_received_at": {"type": "string", "format": "date-time", "description": "When the relay received it."},
    "relay_schema_error": {
        "type": "string",
        "description": "Place and rule that the body breaks. Only with `RELAY_SCHEMA_VALIDATION=report`.",
    },
    SCHEMA_ID_HEADER: {
        "type": "string",
        "description": "Bytes: `0x01` and the 16 bytes of the schema's GUID. Only with `RELAY_SCHEMA_FRAMING=header`.",
    },
    "relay_error_reason": {
        "type": "string",
        "enum": [reason.value for reason in DeadLetterReason],
        "description": "Why it is a dead letter.",
    },
    "relay_error_detail": {
        "type": "string",
        "description": "The place as a JSON pointer and the rule that the body breaks; never a value.",
    },
    REPLAYED_HEADER: {
        "type": "string",
        "pattern": "^[0-9]+@[0-9]+$",
        "description": "The place of the dead letter on this topic, `partition@offset`.",
    },
}
_OF_EVENTS = {"relay_schema_error", SCHEMA_ID_HEADER}
_OF_DEAD_LETTERS = {"relay_error_reason", "relay_error_detail"}
_OF_MARKS = {REPLAYED_HEADER}

_REASONS = {
    DeadLetterReason.UNKNOWN_TYPE: "its `type` is none of the known ones",
    DeadLetterReason.SCHEMA: "it breaks its schema",
    DeadLetterReason.NO_KEY: "it has no chat to belong to: the record has no key",
    DeadLetterReason.REJECTED_BY_KAFKA: "Kafka refused its record for good; the value is `{}`, the spool has it",
}


def document() -> str:
    """The AsyncAPI document of a relay with the default settings, as YAML."""
    text = yaml.dump(_document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return f"# Made by `make docs` from schemas/*.json and the relay's code.\n{text}"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _document() -> Json:
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true"})
    topics = Topics(settings.topic, settings.dead_letter_topic)
    schemas = Schemas.load()
    described = [(kind, schema) for kind in EVENT_TYPES.values() if (schema := schemas.get(kind.name))]
    maker = RecordMaker(topics, {kind.name: schema.uri for kind, schema in described}.get)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Rocket.Chat Omnichannel events",
            "version": relay.__version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": _servers(settings.kafka_bootstrap_servers),
        "channels": {
            "events": {
                "address": topics.events,
                "title": "Events",
                "description": "`RELAY_TOPIC`. All valid events. Those of one chat are on one partition, in the order "
                "in which they were accepted.",
                "messages": {kind.slug: _ref("messages", kind.slug) for kind, _ in described},
                "bindings": {"kafka": {"topic": topics.events, **_BINDING}},
            },
            "deadLetters": {
                "address": topics.dead_letters,
                "title": "Dead letters",
                "description": "`RELAY_DEAD_LETTER_TOPIC`. What Rocket.Chat sent and is no valid event.",
                "messages": {name: _ref("messages", name) for name in ("dead-letter", "replay-mark")},
                "bindings": {"kafka": {"topic": topics.dead_letters, **_BINDING}},
            },
        },
        "operations": {
            "publishEvents": {
                "action": "send",
                "title": "Publish events",
                "summary": "The relay publishes each valid event once, in a transaction.",
                "channel": {"$ref": "#/channels/events"},
            },
            "publishDeadLetters": {
                "action": "send",
                "title": "Publish dead letters",
                "summary": "The relay publishes what is not valid once, in a transaction, with the reason.",
                "channel": {"$ref": "#/channels/deadLetters"},
            },
        },
        "components": {
            "messages": {kind.slug: _message(kind, schema, maker) for kind, schema in described}
            | {"dead-letter": _dead_letter(schemas, maker), "replay-mark": _mark(schemas, maker)},
            "messageBindings": _FRAMINGS,
            "schemas": {"key": _KEY, **HEADERS, **{kind.slug: _payload(schema) for kind, schema in described}},
        },
    }


_DESCRIPTION = """\
What Rocket.Chat's Omnichannel webhooks said, on Kafka: durable, exactly once for `read_committed` consumers, and in
order within each chat. A guide with runnable consumers stands beside this document, in `README.md`.

**Value.** The body as Rocket.Chat sent it, byte for byte. `RELAY_SCHEMA_FRAMING` says how it names its schema:

- `none`, the default without a schema registry: not at all.
- `prefix`, the default with one: `0x00` and the schema's id in four bytes, big-endian, stand before the body.
- `header`: the header `__value_schema_id` has `0x01` and the schema's GUID; the value is the body.

The bindings of the messages are those of `prefix`; `components.messageBindings` has the other two. Dead letters are
never framed.

**Headers.** CloudEvents 1.0, Kafka binding, binary mode. Their values are UTF-8 text, but for `__value_schema_id`.

**To be expected.** Properties that no schema names, and `null` where a property could be absent. New types of event
have a `ce_type` of their own: skip those that you do not know. A redacted property (`RELAY_REDACT`) holds `[redacted]`.
"""

_KEY = {
    "type": "string",
    "description": "The chat's `_id`; of an offline message `offline:` and the e-mail address in lower case.",
}

_FRAMINGS: dict[str, Json] = {
    "prefix-framing": {
        "kafka": {
            "key": {"$ref": "#/components/schemas/key"},
            "schemaIdLocation": "payload",
            "schemaIdPayloadEncoding": "confluent",
            "schemaLookupStrategy": "TopicRecordNameStrategy",
            **_BINDING,
        }
    },
    "header-framing": {
        "kafka": {
            "key": {"$ref": "#/components/schemas/key"},
            "schemaIdLocation": "header",
            "schemaLookupStrategy": "TopicRecordNameStrategy",
            **_BINDING,
        }
    },
    "no-framing": {"kafka": {"key": {"$ref": "#/components/schemas/key"}, **_BINDING}},
}


def _servers(host: str) -> Json:
    security = "The relay knows `RELAY_KAFKA_SECURITY_PROTOCOL`: PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL."
    return {
        "kafka": {
            "host": host,
            "protocol": "kafka",
            "title": "Kafka",
            "description": f"`RELAY_KAFKA_BOOTSTRAP_SERVERS`. {security} Values are not framed.",
            "bindings": {"kafka": _BINDING},
        },
        "kafka-with-registry": {
            "host": host,
            "protocol": "kafka",
            "title": "Kafka with a schema registry",
            "description": "The same, and `RELAY_SCHEMA_REGISTRY_URL`: values are framed.",
            "bindings": {
                "kafka": {
                    "schemaRegistryUrl": "https://registry.example.com",
                    "schemaRegistryVendor": "confluent",
                    **_BINDING,
                }
            },
        },
    }


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _payload(schema: Schema) -> Json:
    return {"schemaFormat": "application/schema+json;version=draft-07", "schema": json.loads(schema.text)}


def _headers(absent: set[str], optional: set[str], known: Json) -> Json:
    names = [name for name in HEADERS if name not in absent]
    return {
        "type": "object",
        "required": [name for name in names if name not in optional],
        "properties": {name: HEADERS[name] | known[name] if name in known else _ref("schemas", name) for name in names},
    }


def _message(kind: EventType, schema: Schema, maker: RecordMaker) -> Json:
    summary = json.loads(schema.text)["description"].split(". ")[0]
    absent = _OF_DEAD_LETTERS | _OF_MARKS | ({"ce_subject"} if kind.name == OFFLINE_MESSAGE else set())
    known = {"ce_type": {"const": kind.ce_type}, "ce_dataschema": {"const": schema.uri}}
    return {
        "name": kind.ce_type,
        "title": kind.slug.replace(".", " ").replace("-", " ").capitalize(),
        "summary": f"{summary}.",
        "description": f"Rocket.Chat's `{kind.name}`.",
        "headers": _headers(absent, _OF_EVENTS, known),
        "payload": _ref("schemas", kind.slug),
        "bindings": _ref("messageBindings", "prefix-framing"),
        "examples": [
            _example(path.stem, maker.record(sequence, event, event.received_at))
            for sequence, (path, event) in enumerate(_samples(kind, schema), 1)
        ],
    }


def _samples(kind: EventType, schema: Schema) -> list[tuple[Path, Event]]:
    found = sorted((SAMPLES / schema.name / "valid").glob(f"{kind.name}.*json"), key=lambda path: path.stem)
    return [(path, _event(path.read_bytes())) for path in found if not any(mark in path.stem for mark in _FORMER)]


def _event(body: bytes) -> Event:
    payload = json.loads(body)
    delivery = Delivery("default", json.dumps(payload, separators=(",", ":")).encode(), 0)
    event = Event.of(delivery, payload)
    happened = datetime.fromisoformat(event.time or payload.get("createdAt", _HAPPENED))
    return event._replace(received_at=round(happened.timestamp() * 1000) + 40)


def _dead_letter(schemas: Schemas, maker: RecordMaker) -> Json:
    reasons = "\n".join(f"- `{reason}`: {said}." for reason, said in _REASONS.items())
    no_time = _event((SAMPLES / "message-saved/invalid/message-without-time.json").read_bytes())
    detail = schemas.judge(no_time.type, json.loads(no_time.body))
    unknown = _event(b'{"_id":"8qTgXo3LmZrK5wYcN","type":"LivechatSessionPaused"}')
    events = {
        "schema": no_time._replace(reason=DeadLetterReason.SCHEMA, detail=detail),
        "unknown type": unknown,
    }
    known = {"ce_type": {"enum": [kind.ce_type for kind in (*EVENT_TYPES.values(), event_type(UNKNOWN_TYPE))]}}
    # There is no schema of an unknown type, and no subject without a chat.
    headers = _headers(_OF_EVENTS | _OF_MARKS, {"ce_subject", "ce_dataschema"}, known)
    return {
        "name": "dead-letter",
        "title": "Dead letter",
        "summary": "What Rocket.Chat sent and is no valid event: as it came, never framed.",
        "description": f"`relay_error_reason` says why:\n\n{reasons}\n",
        "headers": headers,
        "payload": {"type": "object", "description": "Any JSON object."},
        "bindings": _ref("messageBindings", "no-framing"),
        "examples": [_example(name, maker.record(1, event, event.received_at)) for name, event in events.items()],
    }


def _mark(schemas: Schemas, maker: RecordMaker) -> Json:
    schema = schemas.get("Message")
    assert schema
    _, event = _samples(EVENT_TYPES["Message"], schema)[0]
    record = maker.record(1, event, event.received_at)
    letter = Letter.of(Found(0, 42, record.key, record.value, tuple(record.headers)))
    assert letter
    known = {"ce_type": {"enum": [kind.ce_type for kind in EVENT_TYPES.values()]}}
    return {
        "name": "replay-mark",
        "title": "Replay mark",
        "summary": "A dead letter before it on its partition was published after all, by `relay dead replay`.",
        "description": "No dead letter itself: but for the header `relay_replayed` its headers are those of the event, "
        "and its key is the event's.",
        "headers": _headers(_OF_EVENTS | _OF_DEAD_LETTERS, {"ce_subject", "ce_dataschema"}, known),
        "payload": {"const": {}, "description": "Nothing."},
        "bindings": _ref("messageBindings", "no-framing"),
        "examples": [_example("replayed", mark(letter, record, event.received_at))],
    }


def _example(name: str, record: Record) -> Json:
    headers = {name: value.decode() for name, value in record.headers}
    return {
        "name": name,
        "headers": {name: headers[name] for name in HEADERS if name in headers},
        "payload": json.loads(record.value),
    }
