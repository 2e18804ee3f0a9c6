"""How the settings say to reach Kafka and the schema registry."""

import ssl
from collections.abc import Awaitable, Callable

from relay.config import Settings
from relay.connection import Connection
from relay.errors import KafkaDenied, RegistryRefused, SettingsInvalid
from relay.oauth import TokenEndpoint
from relay.registry import Registry, basic, bearer


def connection(settings: Settings) -> Connection:
    """
    How *settings* say to reach Kafka; the password's file is read anew, one with a token again at each login.

    Raises: KafkaDenied.
    """
    oauth = settings.kafka_security_protocol.startswith("SASL") and settings.kafka_sasl_mechanism == "OAUTHBEARER"
    return Connection(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        client_id=settings.kafka_client_id,
        security_protocol=settings.kafka_security_protocol,
        sasl_mechanism=settings.kafka_sasl_mechanism,
        sasl_username=settings.kafka_sasl_username,
        sasl_password=None if oauth else _password(settings),
        sasl_token=_token(settings) if oauth else None,
        ssl_cafile=_path(settings.kafka_ssl_cafile),
        ssl_certfile=_path(settings.kafka_ssl_certfile),
        ssl_keyfile=_path(settings.kafka_ssl_keyfile),
    )


def _password(settings: Settings) -> str | None:
    try:
        return settings.kafka_sasl_password.read() if settings.kafka_sasl_password else None
    except (OSError, ValueError) as error:
        raise KafkaDenied(f"RELAY_KAFKA_SASL_PASSWORD_FILE cannot be read: {error}.") from error


def _token(settings: Settings) -> Callable[[], Awaitable[str]]:
    async def password() -> str:
        return _password(settings) or ""

    if settings.kafka_sasl_token_url is None:
        return password
    # With Kafka's own authority beside the system's: often it is the same private one.
    tls = ssl.create_default_context()
    if settings.kafka_ssl_cafile:
        try:
            tls.load_verify_locations(settings.kafka_ssl_cafile)
        except OSError as error:
            raise KafkaDenied(f"RELAY_KAFKA_SSL_CAFILE cannot be used: {error}.") from error
    return TokenEndpoint(
        settings.kafka_sasl_token_url,
        settings.kafka_sasl_username or "",
        lambda: _password(settings) or "",
        settings.kafka_sasl_token_scope,
        tls,
    ).token


def registry(settings: Settings) -> Registry | None:
    """
    How *settings* say to reach the schema registry, if there is one; its secret is read anew at each request.

    Raises: SettingsInvalid if a certificate cannot be used.
    """
    url = settings.schema_registry_url
    if url is None:
        return None

    def authorization() -> str | None:
        try:
            if settings.schema_registry_token:
                token = settings.schema_registry_token.read()
                if not token.isascii() or not token.isprintable():
                    raise ValueError("a token is one line of ASCII characters")
                return bearer(token)
            if settings.schema_registry_username and settings.schema_registry_password:
                return basic(settings.schema_registry_username, settings.schema_registry_password.read())
        except (OSError, ValueError) as error:
            raise RegistryRefused("", f"its secret cannot be used: {error}") from error
        return None

    tls = _registry_tls(settings) if url.startswith("https:") else None
    return Registry(url, authorization=authorization, ssl_context=tls)


def _registry_tls(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.schema_registry_ssl_cafile)
        if settings.schema_registry_ssl_certfile:
            context.load_cert_chain(settings.schema_registry_ssl_certfile, settings.schema_registry_ssl_keyfile)
    except OSError as error:
        files = "RELAY_SCHEMA_REGISTRY_SSL_CAFILE, _CERTFILE, _KEYFILE"
        raise SettingsInvalid([f"{files}: one of them cannot be used: {error}."]) from error
    return context


def _path(path: object) -> str | None:
    return None if path is None else str(path)
