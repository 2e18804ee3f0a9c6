"""
The schemas of the events: loads and compiles `schemas/*.json`, judges one payload.

A schema's `properties.type.const` is Rocket.Chat's name for the type of event, its `title` the `ce_type`.
`format` is not asserted, and nothing is ever fetched: a `$ref` stays within its file.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import orjson
from jsonschema_rs import Draft7Validator, ValidationError, ValidationErrorKind

from relay.errors import SchemasInvalid
from relay.event import CE_TYPE_PREFIX, UNKNOWN_TYPE, EventTypes, event_types

DRAFT_07 = "http://json-schema.org/draft-07/schema#"

# A title becomes part of a subject, so of the registry's URLs.
_TITLE = re.compile(r"[A-Za-z0-9._-]{1,200}")
_ROOT = "the body"
_MAX_POINTER = 200
_MAX_FAULT = 300


@dataclass(frozen=True)
class Schema:
    """One schema file, compiled."""

    #: The file's name without `.json`.
    name: str
    #: Rocket.Chat's name for the type of event.
    rocketchat_type: str
    #: The file's `title`.
    ce_type: str
    #: The file's `$id`.
    uri: str
    #: The file as it is: what a registry is given.
    text: str = field(repr=False)
    validator: Draft7Validator = field(repr=False, compare=False)

    def judge(self, payload: object) -> str | None:
        """As `Schemas.judge`. Raises: ValueError for lone surrogates, and for errors in what is nested very deeply."""
        if self.validator.is_valid(payload):
            return None
        try:
            # Stops at the first error; to list all would take a second for a long transcript.
            self.validator.validate(payload)
        except ValidationError as error:
            return _detail(error)
        return None


class Schemas:
    """All schemas of a relay, one for each type of event."""

    def __init__(self, by_type: Mapping[str, Schema]) -> None:
        self._by_type = by_type
        #: Rocket.Chat's own types of event, and those that a schema adds.
        self.types: EventTypes = event_types({kind: schema.ce_type for kind, schema in by_type.items()})

    @classmethod
    def load(cls, extra_dir: Path | None = None) -> "Schemas":
        """
        The shipped schemas, and those of *extra_dir*: for further types, or in place of the shipped ones.

        Raises: SchemasInvalid, with every fault of every file.
        """
        schemas, problems = _read(_shipped_dir())
        if extra_dir is not None:
            extra, faults = _read(extra_dir)
            faults += _conflicts(schemas, extra, extra_dir)
            problems += [f"RELAY_SCHEMAS_DIR: {fault}" for fault in faults]
            schemas |= extra
        if problems:
            raise SchemasInvalid(problems)
        return cls(schemas)

    def __iter__(self) -> Iterator[Schema]:
        return iter(self._by_type.values())

    def __len__(self) -> int:
        return len(self._by_type)

    def get(self, rocketchat_type: str) -> Schema | None:
        """The schema of a type of event, if there is one."""
        return self._by_type.get(rocketchat_type)

    def judge(self, rocketchat_type: str, payload: object) -> str | None:
        """
        What is wrong with a parsed *payload*, or None: the place as a JSON pointer, and the rule that it breaks.

        Never a value of the payload, nor a property's name that the schema does not name: such a name shows as `*`.
        A lone surrogate is judged as one character, and whatever JSON parses to is judged without an exception.
        """
        schema = self._by_type.get(rocketchat_type)
        if schema is None:
            return "/type: no schema for it"
        try:
            return schema.judge(payload)
        except ValueError:
            try:
                return schema.judge(_without_surrogates(payload))
            except (ValueError, RecursionError):
                return f"{_ROOT}: not judged, nested too deeply"


def _detail(error: ValidationError) -> str:
    # The error's message quotes the payload, and so may its path: names are the schema's only where that path has them.
    steps = [step if isinstance(step, int) or step in error.evaluation_path else "*" for step in error.instance_path]
    match error.kind:
        case ValidationErrorKind.Required(property=name):
            steps.append(name)
            rule = "required"
        case ValidationErrorKind.Type(types=types):
            rule = f"type ({' or '.join(types)} expected)"
        case kind:
            rule = kind.name
    return f"{_pointer(steps) or _ROOT}: {rule}"


def _pointer(steps: list[str | int]) -> str:
    pointer = "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)
    return pointer[:_MAX_POINTER]


def _without_surrogates(payload: object) -> object:
    # A "?" for each, so that lengths stay.
    return json.loads(json.dumps(payload, ensure_ascii=False).encode(errors="replace"))


def _shipped_dir() -> Traversable:
    installed = files("relay") / "_schemas"
    # In a checkout they have not been copied into the package.
    return installed if installed.is_dir() else Path(__file__).parent.parent / "schemas"


def _read(folder: Traversable) -> tuple[dict[str, Schema], list[str]]:
    found: dict[str, Schema] = {}
    problems: list[str] = []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        return found, [f"{folder}: {error.strerror}"]
    for entry in entries:
        if not entry.name.endswith(".json") or entry.name.startswith("."):
            continue
        try:
            schema = _compile(entry.name.removesuffix(".json"), entry.read_bytes())
        except OSError as error:
            problems.append(f"{entry}: {error.strerror}")
        except ValueError as fault:
            problems.append(f"{entry}: {fault}")
        else:
            first = found.setdefault(schema.rocketchat_type, schema)
            if first is not schema:
                problems.append(f"{entry}: {first.name}.json is for {first.rocketchat_type} too")
    return found, problems


def _compile(name: str, raw: bytes) -> Schema:
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  (a fault of the file, not of the caller)
    if document.get("$schema") not in (DRAFT_07, DRAFT_07.removesuffix("#")):
        raise ValueError(f'"$schema" is not "{DRAFT_07}"')
    try:
        validator = Draft7Validator(document, validate_formats=False, offline=True)
    except ValidationError as error:
        raise ValueError(f"not a schema: #{_pointer(error.instance_path)}: {error.message[:_MAX_FAULT]}") from error
    rocketchat_type = _type(document)
    title, uri = document.get("title"), document.get("$id")
    if not isinstance(title, str) or not _TITLE.fullmatch(title):
        raise ValueError('"title" is not a ce_type: letters, digits, ".", "_" and "-"')
    if title == CE_TYPE_PREFIX + UNKNOWN_TYPE:
        raise ValueError(f'"title" is "{title}", which stands for all types without a schema')
    if not isinstance(uri, str) or not uri:
        raise ValueError('"$id" is missing')
    return Schema(name, rocketchat_type, title, uri, raw.decode(), validator)


def _type(document: Mapping[str, object]) -> str:
    found: object = document
    for step in ("properties", "type", "const"):
        found = found.get(step) if isinstance(found, dict) else None
    if not isinstance(found, str) or not found:
        raise ValueError('"properties.type.const" is not the name of a type of event')
    if found == UNKNOWN_TYPE:
        raise ValueError(f'"properties.type.const" is "{UNKNOWN_TYPE}", which stands for all types without a schema')
    return found


def _conflicts(shipped: Mapping[str, Schema], extra: Mapping[str, Schema], folder: Path) -> Iterator[str]:
    owners = {schema.ce_type: schema.rocketchat_type for schema in shipped.values()}
    for kind, schema in extra.items():
        if kind in shipped and schema.ce_type != shipped[kind].ce_type:
            yield f'{folder / schema.name}.json: the "title" for {kind} is "{shipped[kind].ce_type}"'
        elif owners.setdefault(schema.ce_type, kind) != kind:
            yield f'{folder / schema.name}.json: "{schema.ce_type}" is the "title" for {owners[schema.ce_type]}'
