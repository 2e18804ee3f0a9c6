"""
The schema registry: a client of the Confluent API.

Confluent, Karapace, Apicurio (`/apis/ccompat/v7`) and Redpanda speak this API with texts of their own, so that only
statuses and `error_code` count. Nothing here is tried twice: whoever asks waits and asks again.
"""

import base64
import ssl
import uuid
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

from relay.errors import (
    RegistryError,
    RegistryFailed,
    RegistryNotThere,
    RegistryRefused,
    RegistryUnreachable,
    SchemaIncompatible,
    SchemaMissing,
    SchemaRefused,
)
from relay.framing import Registered

#: What a subject is set to when it is made: consumers that know an older version of a schema can read newer events.
COMPATIBILITY = "FORWARD_TRANSITIVE"

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_SUBJECT_NOT_FOUND = 40401
#: A 404 of the API's own: no subject, no such schema in it, no setting of its own.
_MISSING = (_SUBJECT_NOT_FOUND, 40403, 40408)
_NOT_PERMITTED = 42205
_MAX_ID = (1 << 31) - 1
_MAX_SAID = 300


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
    #: What it has, if that is registered.
    found: Registered | None = None

    @classmethod
    def registered(cls, found: Registered) -> Self:
        """That of a schema which is registered."""
        version = f", version {found.version}" if found.version else ""
        return cls(found.subject, Standing.REGISTERED, f"is registered: id {found.id}{version}", found)


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
            return Verdict.registered(found)
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
        said = answer.get("messages")
        text = "; ".join(map(str, said)) if isinstance(said, list) else ""
        return _short(text) or "the registry does not say why"

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
