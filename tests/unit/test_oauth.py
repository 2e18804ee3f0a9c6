import asyncio
import base64
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trustme
from aiohttp import web

from relay import oauth
from relay.errors import KafkaDenied, KafkaUnreachable
from relay.oauth import TokenEndpoint

SECRET = "a+secret:with%signs"


@dataclass
class Stub:
    """A token endpoint that answers as it is told."""

    url: str = ""
    status: int = 200
    answer: Any = field(default_factory=lambda: {"access_token": "token-{}", "expires_in": 3600})
    seconds: float = 0.0
    forms: list[dict[str, str]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)

    async def post(self, request: web.Request) -> web.Response:
        self.forms.append({name: str(value) for name, value in (await request.post()).items()})
        scheme, _, user = request.headers["Authorization"].partition(" ")
        assert scheme == "Basic"
        self.users.append(base64.b64decode(user).decode())
        await asyncio.sleep(self.seconds)
        answer = self.answer
        if isinstance(answer, dict) and isinstance(answer.get("access_token"), str):
            answer = {**answer, "access_token": answer["access_token"].format(len(self.forms))}
        if isinstance(answer, bytes):
            return web.Response(status=self.status, body=answer, headers={"Location": f"{self.url}?again"})
        return web.json_response(answer, status=self.status)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return who signs the endpoint's certificate."""
    return trustme.CA()


@pytest.fixture
async def stub(authority: trustme.CA) -> AsyncIterator[Stub]:
    """Yield an endpoint."""
    stub = Stub()
    app = web.Application()
    app.router.add_post("/token", stub.post)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    stub.url = f"https://127.0.0.1:{runner.addresses[0][1]}/token"
    yield stub
    await runner.cleanup()


Endpoint = Callable[..., TokenEndpoint]


@pytest.fixture
def endpoint(stub: Stub, authority: trustme.CA) -> Endpoint:
    """Return a function that makes what is tested."""

    def make(scope: str | None = None, *, password: Callable[[], str] = lambda: SECRET) -> TokenEndpoint:
        tls = ssl.create_default_context()
        authority.configure_trust(tls)
        return TokenEndpoint(stub.url, "relay/id", password, scope, tls)

    return make


async def test_a_token_is_asked_for_as_rfc_6749_says(stub: Stub, endpoint: Endpoint) -> None:
    assert await endpoint("kafka.default").token() == "token-1"
    assert stub.forms == [{"grant_type": "client_credentials", "scope": "kafka.default"}]
    assert stub.users == ["relay%2Fid:a%2Bsecret%3Awith%25signs"]


async def test_without_a_scope_none_is_asked_for(stub: Stub, endpoint: Endpoint) -> None:
    await endpoint().token()
    assert "scope" not in stub.forms[0]


async def test_a_token_is_kept_until_shortly_before_it_expires(
    stub: Stub, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(oauth, "monotonic", lambda: now)
    found = endpoint()
    stub.answer["expires_in"] = 100
    assert await found.token() == "token-1"
    now += 79
    assert await found.token() == "token-1"
    now += 2
    assert await found.token() == "token-2"
    stub.answer["expires_in"] = 86400
    now += 100
    assert await found.token() == "token-3"
    now += 86400 - 61
    assert await found.token() == "token-3"
    now += 2
    assert await found.token() == "token-4"


async def test_a_token_that_does_not_say_how_long_it_lives_is_used_once(stub: Stub, endpoint: Endpoint) -> None:
    del stub.answer["expires_in"]
    found = endpoint()
    assert [await found.token(), await found.token()] == ["token-1", "token-2"]


async def test_who_asks_at_the_same_time_gets_the_same_token(stub: Stub, endpoint: Endpoint) -> None:
    found = endpoint()
    assert await asyncio.gather(*(found.token() for _ in range(5))) == ["token-1"] * 5
    assert len(stub.forms) == 1


async def test_the_password_of_now_is_shown(stub: Stub, endpoint: Endpoint) -> None:
    passwords = iter(["first", "second"])
    found = endpoint(password=lambda: next(passwords))
    stub.answer["expires_in"] = 0
    await found.token()
    await found.token()
    assert stub.users == ["relay%2Fid:first", "relay%2Fid:second"]


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (401, {"error": "invalid_client", "error_description": "unknown"}, (KafkaDenied, "invalid_client: unknown")),
        (400, {"error": "invalid_scope"}, (KafkaDenied, "400 invalid_scope")),
        (404, b"<html>", (KafkaDenied, "answers 404")),
        (302, b"", (KafkaDenied, "answers 302")),
        (503, b"busy", (KafkaUnreachable, "answers 503")),
        (200, b"<html>", (KafkaDenied, "without an access token")),
        (200, ["token"], (KafkaDenied, "without an access token")),
        (200, {"access_token": 1}, (KafkaDenied, "without an access token")),
        (200, {"access_token": ""}, (KafkaDenied, "without an access token")),
        (200, {"access_token": "{}", "expires_in": "soon"}, (KafkaDenied, "without an access token")),
    ],
    ids=str,
)
async def test_what_is_no_token_is_told_with_the_setting(
    stub: Stub, endpoint: Endpoint, status: int, answer: object, expected: tuple[type[Exception], str]
) -> None:
    error, told = expected
    stub.status, stub.answer = status, answer
    with pytest.raises(error, match=told) as caught:
        await endpoint().token()
    assert f"RELAY_KAFKA_SASL_TOKEN_URL: {stub.url}" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(stub.forms) == 1


async def test_after_a_failure_it_is_asked_again(stub: Stub, endpoint: Endpoint) -> None:
    found = endpoint()
    stub.status = 503
    with pytest.raises(KafkaUnreachable):
        await found.token()
    stub.status = 200
    assert await found.token() == "token-2"


async def test_an_endpoint_that_is_silent_is_not_waited_for(
    stub: Stub, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "_TIMEOUT", 0.1)
    stub.seconds = 5.0
    with pytest.raises(KafkaUnreachable, match=r"nothing within 0\.1 s"):
        await endpoint().token()


async def test_an_endpoint_that_is_not_there_is_told() -> None:
    nowhere = TokenEndpoint("http://127.0.0.1:1/token", "id", lambda: SECRET, None, ssl.create_default_context())
    with pytest.raises(KafkaUnreachable, match="RELAY_KAFKA_SASL_TOKEN_URL"):
        await nowhere.token()


async def test_an_endpoint_that_nobody_vouches_for_is_not_shown_the_password(stub: Stub) -> None:
    stranger = TokenEndpoint(stub.url, "id", lambda: SECRET, None, ssl.create_default_context())
    with pytest.raises(KafkaUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        await stranger.token()
    assert not stub.users
