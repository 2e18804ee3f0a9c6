from pathlib import Path

import pytest
from registry_for_tests import stub_registry

from relay.clients import connection, registry
from relay.config import Settings
from relay.errors import KafkaDenied, KafkaUnreachable, RegistryRefused, SettingsInvalid
from relay.registry import Registry

TOKEN = {"RELAY_TOKEN": "s3cret"}


def test_the_settings_say_how_to_reach_kafka(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("first\n")
    settings = Settings.read(
        {
            **TOKEN,
            "RELAY_KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2",
            "RELAY_KAFKA_CLIENT_ID": "sidecar",
            "RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "RELAY_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "RELAY_KAFKA_SASL_USERNAME": "ada",
            "RELAY_KAFKA_SASL_PASSWORD_FILE": str(password),
            "RELAY_KAFKA_SSL_CAFILE": str(password),
        }
    )
    found = connection(settings)
    assert (found.bootstrap_servers, found.client_id) == ("a:1,b:2", "sidecar")
    assert (found.security_protocol, found.sasl_mechanism) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (found.sasl_username, found.sasl_password) == ("ada", "first")
    assert (found.ssl_cafile, found.ssl_certfile) == (str(password), None)
    password.write_text("second")
    assert connection(settings).sasl_password == "second"
    password.unlink()
    with pytest.raises(KafkaDenied, match="RELAY_KAFKA_SASL_PASSWORD_FILE"):
        connection(settings)


OAUTH = {**TOKEN, "RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "RELAY_KAFKA_SASL_MECHANISM": "OAUTHBEARER"}


async def test_a_token_s_file_is_read_at_every_login(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    found = connection(Settings.read(OAUTH | {"RELAY_KAFKA_SASL_PASSWORD_FILE": str(file)}))
    assert found.sasl_token
    assert (found.sasl_password, await found.sasl_token()) == (None, "first")
    file.write_text("second")
    assert await found.sasl_token() == "second"
    file.unlink()
    with pytest.raises(KafkaDenied, match="RELAY_KAFKA_SASL_PASSWORD_FILE"):
        await found.sasl_token()


async def test_a_token_endpoint_s_secret_is_read_when_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("sesame")
    environ = {
        "RELAY_KAFKA_SASL_TOKEN_URL": "https://127.0.0.1:1/token",
        "RELAY_KAFKA_SASL_USERNAME": "relay",
        "RELAY_KAFKA_SASL_PASSWORD_FILE": str(file),
    }
    found = connection(Settings.read(OAUTH | environ))
    assert found.sasl_token
    with pytest.raises(KafkaUnreachable, match="RELAY_KAFKA_SASL_TOKEN_URL"):
        await found.sasl_token()
    file.unlink()
    with pytest.raises(KafkaDenied, match="RELAY_KAFKA_SASL_PASSWORD_FILE"):
        await found.sasl_token()


def test_an_authority_that_cannot_be_used_for_the_token_endpoint_is_told() -> None:
    environ = {
        "RELAY_KAFKA_SASL_TOKEN_URL": "https://127.0.0.1:1/token",
        "RELAY_KAFKA_SASL_USERNAME": "relay",
        "RELAY_KAFKA_SASL_PASSWORD": "sesame",
        "RELAY_KAFKA_SSL_CAFILE": __file__,
    }
    with pytest.raises(KafkaDenied, match="RELAY_KAFKA_SSL_CAFILE"):
        connection(Settings.read(OAUTH | environ))


@pytest.mark.parametrize("other", [{"RELAY_KAFKA_SASL_MECHANISM": "PLAIN"}, {"RELAY_KAFKA_SECURITY_PROTOCOL": "SSL"}])
def test_without_oauthbearer_nobody_is_asked_for_a_token(other: dict[str, str]) -> None:
    user = {"RELAY_KAFKA_SASL_USERNAME": "ada", "RELAY_KAFKA_SASL_PASSWORD": "sesame"}
    found = connection(Settings.read(OAUTH | user | other))
    assert (found.sasl_password, found.sasl_token) == ("sesame", None)


# --- The schema registry. ---


def registry_at(url: str, environ: dict[str, str] | None = None) -> Registry:
    found = registry(Settings.read(TOKEN | {"RELAY_SCHEMA_REGISTRY_URL": url} | (environ or {})))
    assert found is not None
    return found


def test_without_its_url_there_is_no_registry() -> None:
    assert registry(Settings.read(TOKEN)) is None


async def test_a_registry_is_shown_the_user_or_the_token_that_the_settings_say(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("first\n")
    async with stub_registry() as stub:
        for environ in (
            {},
            {"RELAY_SCHEMA_REGISTRY_USERNAME": "ada", "RELAY_SCHEMA_REGISTRY_PASSWORD": "sesame"},
            {"RELAY_SCHEMA_REGISTRY_TOKEN_FILE": str(secret)},
        ):
            async with registry_at(stub.url, environ) as client:
                secret.write_text("first\n")
                await client.subjects()
                secret.write_text("second\n")
                await client.subjects()
    user = "Basic YWRhOnNlc2FtZQ=="
    assert stub.authorizations == [None, None, user, user, "Bearer first", "Bearer second"]


async def test_a_secret_that_cannot_be_read_any_more_is_told_when_it_is_needed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    async with registry_at("http://127.0.0.1:1", {"RELAY_SCHEMA_REGISTRY_TOKEN_FILE": str(secret)}) as client:
        secret.unlink()
        with pytest.raises(RegistryRefused, match=f"its secret cannot be used: .*{secret}"):
            await client.subjects()


@pytest.mark.parametrize("token", ["first\nsecond", "sés\u0131me", "with a \x00"])
async def test_a_token_that_can_stand_in_no_header_is_told_until_it_is_mended(tmp_path: Path, token: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(token)
    environ = {"RELAY_SCHEMA_REGISTRY_TOKEN_FILE": str(secret)}
    async with stub_registry() as stub, registry_at(stub.url, environ) as client:
        with pytest.raises(RegistryRefused, match="a token is one line"):
            await client.subjects()
        secret.write_text("sesame")
        await client.subjects()
    assert stub.authorizations == ["Bearer sesame"]


def test_certificates_that_cannot_be_used_are_told_at_once() -> None:
    for name in ("CAFILE", "CERTFILE"):
        environ = {f"RELAY_SCHEMA_REGISTRY_SSL_{name}": __file__}
        if name == "CERTFILE":
            environ["RELAY_SCHEMA_REGISTRY_SSL_KEYFILE"] = __file__
        with pytest.raises(SettingsInvalid, match="RELAY_SCHEMA_REGISTRY_SSL_CAFILE, _CERTFILE, _KEYFILE"):
            registry_at("https://127.0.0.1:1", environ)
