"""
The schema registry: subjects, a client of the Confluent API, and how a value names its schema.

Confluent, Karapace, Apicurio (`/apis/ccompat/v7`) and Redpanda speak this API with texts of their own, so that only
statuses and `error_code` count. Nothing here is tried twice: whoever asks waits and asks again.
"""

import base64
import hashlib
import json
import ssl
import uuid
from collections.abc import Callable, Iterable
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self
from urllib.parse import quote

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

from relay.errors import RelayError

#: What a subject is set to when it is made: consumers that know an older version of a schema can read newer events.
COMPATIBILITY = "FORWARD_TRANSITIVE"

#: The header of `header` framing, as Confluent's clients name it.
SCHEMA_ID_HEADER = "__value_schema_id"

Framing = Literal["none", "prefix", "header"]
Strategy = Literal["topic-record", "record", "topic"]

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_SUBJECT_NOT_FOUND = 40401
#: A 404 of the API's own: no subject, no such schema in it, no setting of its own.
_MISSING = {_SUBJECT_NOT_FOUND, 40403, 40408}
_NOT_PERMITTED = 42205
_PREFIX_BYTES = 5
_MAX_ID = (1 << 31) - 1
_MAX_SAID = 300


# --- Keep everything, wait, and ask the registry again. ---


class RegistryError(RelayError):
    """The schema registry gave no schema id."""

    def __init__(self, subject: str, reason: str = "") -> None:
        text = f"{type(self).__doc__} Subject {subject}" if subject else str(type(self).__doc__)
        super().__init__(f"{text}: {reason}" if reason else text)
        #: What was asked about; empty if it was not about one subject.
        self.subject = subject
        self.reason = reason


class RegistryUnreachable(RegistryError):
    """The schema registry does not answer."""


class RegistryFailed(RegistryError):
    """The schema registry does not do what was asked."""


class RegistryNotThere(RegistryFailed):
    """Something without this part of a schema registry's API answers: is RELAY_SCHEMA_REGISTRY_URL right?"""


class RegistryRefused(RegistryError):
    """The schema registry refuses the relay's rights or password."""


class SchemaMissing(RegistryError):
    """The schema registry does not have this schema."""

    def __init__(self, subject: str, reason: str = "", *, new_subject: bool = False) -> None:
        super().__init__(subject, reason)
        #: Whether the subject does not exist either.
        self.new_subject = new_subject


class SchemaIncompatible(RegistryError):
    """The schema registry finds this schema incompatible with the subject's earlier ones."""


class SchemaRefused(RegistryError):
    """The schema registry takes this for no valid schema."""


class GuidMissing(RegistryError):
    """The schema registry gives no GUIDs, which `header` framing needs."""


# --- Subjects. ---


class Described(Protocol):
    """One schema file: schemas.Schema."""

    @property
    def ce_type(self) -> str:
        """Its title."""

    @property
    def text(self) -> str:
        """The file."""


class Registration(NamedTuple):
    """What a registry is to have under one subject."""

    subject: str
    text: str
    #: Of the schema files in *text*: one, or all that share a topic's subject.
    fingerprints: tuple[str, ...]


def fingerprint(text: str) -> str:
    """A short name for what a schema file says, however it is formatted: what an event remembers of its judge."""
    return hashlib.sha256(orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def subject(strategy: Strategy, topic: str, ce_type: str) -> str:
    """The subject of such events on *topic*: Confluent's TopicRecord-, Record- or TopicNameStrategy."""
    names = {"topic-record": f"{topic}-{ce_type}", "record": ce_type, "topic": f"{topic}-value"}
    return names[strategy]


def registrations(strategy: Strategy, placed: Iterable[tuple[str, Described]]) -> list[Registration]:
    """
    What a registry is to have for schemas that are *placed* on topics, each subject once.

    With `topic` all schemas of one topic are registered as one: a `oneOf` of them.
    """
    members: dict[str, dict[str, str]] = {}
    for topic, schema in placed:
        members.setdefault(subject(strategy, topic, schema.ce_type), {})[fingerprint(schema.text)] = schema.text
    return [
        Registration(name, texts[0] if len(texts := [*found.values()]) == 1 else _one_of(name, texts), tuple(found))
        for name, found in members.items()
    ]


def _one_of(title: str, texts: list[str]) -> str:
    documents: list[dict[str, Any]] = [json.loads(text) for text in texts]
    return json.dumps({"$schema": documents[0]["$schema"], "title": title, "oneOf": documents})


# --- Framing. ---


class Registered(NamedTuple):
    """A schema as the registry knows it."""

    subject: str
    id: int
    #: Its 16 bytes, from a registry that has GUIDs.
    guid: bytes | None = None
    version: int | None = None


class Frame(NamedTuple):
    """What a record gets so that its value names its schema."""

    prefix: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()


def frame(framing: Framing, registered: Registered) -> Frame:
    """
    How records of this schema are framed: nothing; 0x00 and the id in four bytes before the value; or a header with
    0x01 and the GUID.

    Raises: GuidMissing.
    """
    if framing == "none":
        return Frame()
    if framing == "prefix":
        return Frame(prefix=b"\x00" + registered.id.to_bytes(4, "big"))
    if registered.guid is None:
        raise GuidMissing(
            registered.subject,
            f"it gave only the id {registered.id}. Set RELAY_SCHEMA_FRAMING=prefix, or use a registry with GUIDs: "
            "Confluent's has them, Apicurio's and Karapace's have not.",
        )
    return Frame(headers=((SCHEMA_ID_HEADER, b"\x01" + registered.guid),))


def unframed(value: bytes) -> tuple[int | None, bytes]:
    """The id in a value with `prefix` framing and what follows it; no JSON begins with 0x00."""
    if value[:1] != b"\x00" or len(value) < _PREFIX_BYTES:
        return None, value
    return int.from_bytes(value[1:_PREFIX_BYTES], "big"), value[_PREFIX_BYTES:]


# --- The client. ---


class Standing(StrEnum):
    """How a schema stands with the registry."""

    REGISTERED = "registered"
    #: The subject does not exist: whatever is valid would be accepted.
    NEW = "new"
    COMPATIBLE = "compatible"
    INCOMPATIBLE = "incompatible"


class Verdict(NamedTuple):
    """What the registry would do with a schema."""

    subject: str
    standing: Standing
    #: For people.
    text: str


def basic(username: str, password: str) -> str:
    """The header `Authorization` of a user with a password."""
    return f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"


def bearer(token: str) -> str:
    """The header `Authorization` of who has a token."""
    return f"Bearer {token}"


class Registry:
    """A client, as an async context manager; it may be used for several requests at once."""

    def __init__(
        self,
        url: str,
        *,
        authorization: Callable[[], str | None] = lambda: None,
        ssl_context: ssl.SSLContext | None = None,
        timeout: float = 10.0,
        connections: int = 4,
    ) -> None:
        """
        *authorization* is asked for the header at each request, so that a password may change.

        Raises: ValueError if *url* is none.
        """
        address = URL(url)
        if address.scheme not in {"http", "https"} or not address.host:
            raise ValueError("must be a URL that begins with http:// or https://")
        #: Where the API is, without any password.
        self.url = str(address.with_user(None)).rstrip("/")
        self._authorization = authorization
        self._ssl_context = ssl_context
        self._timeout = timeout
        self._connections = connections
        self._session: ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = ClientSession(
            connector=TCPConnector(limit=self._connections, ssl=self._ssl_context or True),
            timeout=ClientTimeout(total=self._timeout),
            cookie_jar=DummyCookieJar(),
            headers={"Accept": f"{_CONTENT_TYPE}, application/json", "Content-Type": _CONTENT_TYPE},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()

    async def register(self, subject: str, text: str) -> Registered:
        """
        The schema's id, whether it is new to *subject* or not.

        A subject that does not exist is made, and set to COMPATIBILITY unless somebody has set it already. An existing
        one keeps its setting. A schema that is known already needs the right to read only.

        Raises: RegistryError.
        """
        try:
            return await self.look_up(subject, text)
        except SchemaMissing as missing:
            new = missing.new_subject
        if new and await self._compatibility(subject) is None:
            # Before its first version: were it set after that, a failure between the two would leave it unset for good.
            await self._set_compatibility(subject)
        answer = await self._ask(subject, "POST", f"/subjects/{_quoted(subject)}/versions?normalize=true", _body(text))
        return self._registered(subject, answer)

    async def look_up(self, subject: str, text: str) -> Registered:
        """
        The schema's id, changing nothing.

        Raises: SchemaMissing, RegistryError.
        """
        answer = await self._ask(subject, "POST", f"/subjects/{_quoted(subject)}?normalize=true", _body(text))
        return self._registered(subject, answer)

    async def check(self, subject: str, text: str) -> Verdict:
        """
        What `register` would come to, changing nothing.

        Raises: RegistryError.
        """
        try:
            found = await self.look_up(subject, text)
        except SchemaMissing as missing:
            if missing.new_subject:
                return Verdict(subject, Standing.NEW, "the subject does not exist; registering makes it")
        else:
            version = f", version {found.version}" if found.version else ""
            return Verdict(subject, Standing.REGISTERED, f"is registered: id {found.id}{version}")
        objections = await self._objections(subject, text)
        if objections is None:
            return Verdict(subject, Standing.COMPATIBLE, "would be accepted as a new version")
        return Verdict(subject, Standing.INCOMPATIBLE, f"would be refused: {objections}")

    async def subjects(self) -> list[str]:
        """
        The names of all subjects.

        Raises: RegistryError.
        """
        answer = await self._ask("", "GET", "/subjects")
        if not isinstance(answer, list):
            raise RegistryFailed("", f"{self.url} does not answer with a list of subjects.")
        return sorted(map(str, answer))

    async def _compatibility(self, subject: str, query: str = "") -> str | None:
        """The subject's own setting, if it has one."""
        try:
            answer = await self._ask(subject, "GET", f"/config/{_quoted(subject)}{query}")
        except SchemaMissing:
            return None
        if not isinstance(answer, dict) or not isinstance(answer.get("compatibilityLevel"), str):
            raise RegistryFailed(subject, f"{self.url} does not say what its compatibility is set to.")
        return str(answer["compatibilityLevel"])

    async def _set_compatibility(self, subject: str) -> None:
        answer = await self._ask(subject, "PUT", f"/config/{_quoted(subject)}", {"compatibility": COMPATIBILITY})
        if not isinstance(answer, dict):
            raise RegistryFailed(subject, f"{self.url} does not confirm the compatibility.")

    async def _objections(self, subject: str, text: str) -> str | None:
        """Why the schema would not be accepted, or None."""
        path = f"/compatibility/subjects/{_quoted(subject)}/versions"
        query = "?verbose=true&normalize=true"
        try:
            return self._said_of(subject, await self._ask(subject, "POST", path + query, _body(text)))
        except RegistryNotThere:
            # Karapace and Redpanda compare with one version at a time only.
            level = await self._compatibility(subject, "?defaultToGlobal=true") or ""
            versions = await self._versions(subject) if level.endswith("TRANSITIVE") else ["latest"]
        for version in versions:
            answer = await self._ask(subject, "POST", f"{path}/{version}{query}", _body(text))
            if (said := self._said_of(subject, answer)) is not None:
                return f"version {version}: {said}"
        return None

    async def _versions(self, subject: str) -> list[Any]:
        answer = await self._ask(subject, "GET", f"/subjects/{_quoted(subject)}/versions")
        if not isinstance(answer, list):
            raise RegistryFailed(subject, f"{self.url} does not answer with a list of versions.")
        return answer

    def _said_of(self, subject: str, answer: Any) -> str | None:
        if not isinstance(answer, dict) or not isinstance(answer.get("is_compatible"), bool):
            raise RegistryFailed(subject, f"{self.url} does not say whether it is compatible.")
        if answer["is_compatible"]:
            return None
        return _short("; ".join(map(str, answer.get("messages") or ()))) or "the registry does not say why"

    def _registered(self, subject: str, answer: Any) -> Registered:
        try:
            id_, guid, version = answer["id"], answer.get("guid"), answer.get("version")
            if not isinstance(id_, int) or not 0 <= id_ <= _MAX_ID:
                raise ValueError
            return Registered(subject, id_, uuid.UUID(guid).bytes if guid else None, version)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RegistryFailed(subject, f"{self.url} answers without a schema id.") from None

    async def _ask(self, subject: str, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """The answer as JSON; None if it is none."""
        assert self._session is not None, "used outside its context"
        authorization = self._authorization()
        try:
            async with self._session.request(
                method,
                URL(self.url + path, encoded=True),
                data=None if body is None else orjson.dumps(body),
                headers={"Authorization": authorization} if authorization else None,
                allow_redirects=False,  # It would send the password along, and make a POST a GET.
            ) as response:
                answer = _parse(await response.read())
        except TimeoutError:
            raise RegistryUnreachable(subject, f"{self.url} gave no answer within {self._timeout:g} s.") from None
        except (ClientError, OSError) as error:
            raise RegistryUnreachable(subject, f"{self.url}: {_short(str(error)) or type(error).__name__}") from error
        if not 200 <= response.status < 300:
            raise _failure(subject, self.url, response, answer)
        return answer


_MEANINGS: dict[int, type[RegistryError]] = {
    400: SchemaRefused,
    401: RegistryRefused,
    403: RegistryRefused,
    404: RegistryNotThere,
    405: RegistryNotThere,
    409: SchemaIncompatible,
    413: SchemaRefused,
    422: SchemaRefused,
}


def _failure(subject: str, url: str, response: ClientResponse, answer: Any) -> RegistryError:
    said = answer if isinstance(answer, dict) else {}
    reason = said.get("message") or response.headers.get("Location") or response.reason
    text = f"{url} answers {response.status}: {_short(str(reason))}"
    code = said.get("error_code")
    if code in _MISSING:
        return SchemaMissing(subject, text, new_subject=code == _SUBJECT_NOT_FOUND)
    # A registry or subject may be set to be read only.
    meaning = RegistryRefused if code == _NOT_PERMITTED else _MEANINGS.get(response.status, RegistryFailed)
    return meaning(subject, text)


def _body(text: str) -> dict[str, str]:
    return {"schemaType": "JSON", "schema": text}


def _parse(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def _quoted(subject: str) -> str:
    return quote(subject, safe="")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SAID else f"{text[:_MAX_SAID]}..."
