"""Access tokens for Kafka by client credentials (RFC 6749, section 4.4)."""

import asyncio
import ssl
from base64 import b64encode
from collections.abc import Callable
from time import monotonic
from typing import Any
from urllib.parse import quote

import orjson
from aiohttp import ClientError, ClientSession, ClientTimeout

from relay.errors import KafkaDenied, KafkaUnreachable

_TIMEOUT = 10.0
#: A token is renewed when this part of its life is left, or that many seconds.
_MARGIN, _MAX_MARGIN = 0.2, 60.0


class TokenEndpoint:
    """Gives an access token, the same one until shortly before it expires."""

    def __init__(
        self, url: str, username: str, password: Callable[[], str], scope: str | None, ssl_context: ssl.SSLContext
    ) -> None:
        """*password* is asked for at each request; raises: KafkaDenied."""
        self._url = url
        self._username = username
        self._password = password
        self._scope = scope
        self._ssl_context = ssl_context
        self._token = ""
        self._fresh_until = 0.0
        self._one_at_a_time = asyncio.Lock()

    async def token(self) -> str:
        """
        The token, asking for a new one if need be.

        Raises: KafkaDenied, KafkaUnreachable; neither holds the password or a token.
        """
        async with self._one_at_a_time:
            if monotonic() >= self._fresh_until:
                await self._renew()
            return self._token

    async def _renew(self) -> None:
        asked_at = monotonic()
        answer = await self._ask()
        token, lifetime = answer.get("access_token"), answer.get("expires_in", 0)
        if not isinstance(token, str) or not token or not isinstance(lifetime, int | float):
            raise KafkaDenied(f"RELAY_KAFKA_SASL_TOKEN_URL: {self._url} answers without an access token.")
        self._token = token
        self._fresh_until = asked_at + lifetime - min(lifetime * _MARGIN, _MAX_MARGIN)

    async def _ask(self) -> dict[str, Any]:
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        # Both are encoded like the parts of a form first: RFC 6749, section 2.3.1.
        login = f"{quote(self._username, safe='')}:{quote(self._password(), safe='')}".encode()
        headers = {"Authorization": f"Basic {b64encode(login).decode()}", "Accept": "application/json"}
        try:
            async with (
                ClientSession(timeout=ClientTimeout(total=_TIMEOUT)) as session,
                session.post(
                    self._url, data=form, headers=headers, ssl=self._ssl_context, allow_redirects=False
                ) as response,
            ):
                status, body = response.status, await response.read()
        except (ClientError, TimeoutError, OSError) as error:
            said = str(error) or f"nothing within {_TIMEOUT:g} s"
            raise KafkaUnreachable(
                f"RELAY_KAFKA_SASL_TOKEN_URL: {self._url} gives no token for Kafka: {said}."
            ) from error
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            answer = {}
        if status == 200:
            return answer
        said = ": ".join(str(answer[key]) for key in ("error", "error_description") if key in answer)
        text = f"RELAY_KAFKA_SASL_TOKEN_URL: {self._url} answers {status} {said}".rstrip()
        if status >= 500:
            raise KafkaUnreachable(f"{text}.")
        raise KafkaDenied(f"{text}: change it, RELAY_KAFKA_SASL_USERNAME or RELAY_KAFKA_SASL_PASSWORD (or its file).")
