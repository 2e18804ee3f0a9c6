import dataclasses
from pathlib import Path

import pytest

from relay.config import Settings, settings_table, variable
from relay.errors import SettingsInvalid

NEEDED = {"RELAY_TOKEN": "s3cret"}

DEFAULTS = {
    "RELAY_TOKEN": "********",
    "RELAY_WORKSPACES_DIR": "",
    "RELAY_ALLOW_UNAUTHENTICATED": "false",
    "RELAY_HTTP_HOST": "127.0.0.1",
    "RELAY_HTTP_PORT": "8080",
    "RELAY_HTTP_TLS_CERTFILE": "",
    "RELAY_HTTP_TLS_KEYFILE": "",
    "RELAY_ADMIN_HOST": "0.0.0.0",
    "RELAY_ADMIN_PORT": "8081",
    "RELAY_MAX_BODY_BYTES": "16777216",
    "RELAY_ACK": "spool",
    "RELAY_DELIVERY": "exactly-once",
    "RELAY_SPOOL_PATH": "spool/relay.db",
    "RELAY_SPOOL_MAX_BYTES": "1073741824",
    "RELAY_DEDUPE_WINDOW_SECONDS": "300",
    "RELAY_TOPIC": "rocketchat.omnichannel",
    "RELAY_DEAD_LETTER_TOPIC": "rocketchat.omnichannel.dead-letter",
    "RELAY_WATERMARK_TOPIC": "rocketchat.omnichannel.watermarks",
    "RELAY_TOPIC_CREATE": "false",
    "RELAY_KAFKA_BOOTSTRAP_SERVERS": "localhost:9092",
    "RELAY_KAFKA_CLIENT_ID": "relay",
    "RELAY_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
    "RELAY_KAFKA_SASL_MECHANISM": "PLAIN",
    "RELAY_KAFKA_SASL_USERNAME": "",
    "RELAY_KAFKA_SASL_PASSWORD": "",
    "RELAY_KAFKA_SASL_TOKEN_URL": "",
    "RELAY_KAFKA_SASL_TOKEN_SCOPE": "",
    "RELAY_KAFKA_SSL_CAFILE": "",
    "RELAY_KAFKA_SSL_CERTFILE": "",
    "RELAY_KAFKA_SSL_KEYFILE": "",
    "RELAY_KAFKA_COMPRESSION": "zstd",
    "RELAY_SCHEMA_REGISTRY_URL": "",
    "RELAY_SCHEMA_REGISTRY_USERNAME": "",
    "RELAY_SCHEMA_REGISTRY_PASSWORD": "",
    "RELAY_SCHEMA_REGISTRY_TOKEN": "",
    "RELAY_SCHEMA_REGISTRY_SSL_CAFILE": "",
    "RELAY_SCHEMA_REGISTRY_SSL_CERTFILE": "",
    "RELAY_SCHEMA_REGISTRY_SSL_KEYFILE": "",
    "RELAY_SCHEMA_FRAMING": "none",
    "RELAY_SUBJECT_STRATEGY": "topic-record",
    "RELAY_SCHEMA_REGISTER": "true",
    "RELAY_SCHEMA_VALIDATION": "enforce",
    "RELAY_SCHEMAS_DIR": "",
    "RELAY_REDACT": "",
    "RELAY_DRAIN_SECONDS": "20",
    "RELAY_LOG_LEVEL": "info",
    "RELAY_LOG_FORMAT": "json",
}


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsInvalid) as caught:
        Settings.read(environ)
    return caught.value.problems


def test_every_setting_has_the_default_of_the_contract() -> None:
    assert Settings.read(NEEDED).effective() == DEFAULTS


def test_an_empty_variable_counts_as_not_set() -> None:
    assert Settings.read(dict.fromkeys(DEFAULTS, "") | NEEDED).effective() == DEFAULTS


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("RELAY_HTTP_PORT", "0", 0),
        ("RELAY_HTTP_PORT", "65535", 65535),
        ("RELAY_MAX_BODY_BYTES", "1024", 1024),
        ("RELAY_TOPIC_CREATE", "TRUE", True),
        ("RELAY_TOPIC_CREATE", "1", True),
        ("RELAY_SCHEMA_REGISTER", "no", False),
        ("RELAY_DEDUPE_WINDOW_SECONDS", "0", 0.0),
        ("RELAY_DRAIN_SECONDS", "1.5", 1.5),
        ("RELAY_ACK", "kafka", "kafka"),
        ("RELAY_DELIVERY", "at-least-once", "at-least-once"),
        ("RELAY_SPOOL_PATH", "/data/relay.db", Path("/data/relay.db")),
        ("RELAY_TOPIC", "rc.{workspace}.{type}", "rc.{workspace}.{type}"),
        ("RELAY_REDACT", "/visitor/token, /messages/*/msg", ("/visitor/token", "/messages/*/msg")),
        ("RELAY_KAFKA_COMPRESSION", "none", "none"),
        ("RELAY_LOG_FORMAT", "text", "text"),
    ],
)
def test_a_value_is_read(name: str, text: str, value: object) -> None:
    settings = Settings.read(NEEDED | {name: text})
    assert getattr(settings, name.removeprefix("RELAY_").lower()) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RELAY_ALLOW_UNAUTHENTICATED", "maybe"),
        ("RELAY_HTTP_PORT", "-1"),
        ("RELAY_HTTP_PORT", "65536"),
        ("RELAY_HTTP_PORT", "80 "),
        ("RELAY_ADMIN_PORT", "http"),
        ("RELAY_HTTP_TLS_CERTFILE", "/nowhere/tls.crt"),
        ("RELAY_HTTP_TLS_KEYFILE", "/"),
        ("RELAY_WORKSPACES_DIR", "/nowhere"),
        ("RELAY_MAX_BODY_BYTES", "16M"),
        ("RELAY_MAX_BODY_BYTES", "1023"),
        ("RELAY_ACK", "disk"),
        ("RELAY_DELIVERY", "exactly_once"),
        ("RELAY_SPOOL_MAX_BYTES", "1e9"),
        ("RELAY_DEDUPE_WINDOW_SECONDS", "-1"),
        ("RELAY_DEDUPE_WINDOW_SECONDS", "5m"),
        ("RELAY_DEDUPE_WINDOW_SECONDS", "nan"),
        ("RELAY_TOPIC", "no spaces"),
        ("RELAY_TOPIC", "{chat}"),
        ("RELAY_TOPIC", ".."),
        ("RELAY_TOPIC", "x" * 250),
        ("RELAY_DEAD_LETTER_TOPIC", "{type}"),
        ("RELAY_WATERMARK_TOPIC", "a/b"),
        ("RELAY_TOPIC_CREATE", "on"),
        ("RELAY_KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("RELAY_KAFKA_SASL_MECHANISM", "GSSAPI"),
        ("RELAY_KAFKA_SASL_TOKEN_URL", "login.example.com/token"),
        ("RELAY_KAFKA_SASL_TOKEN_URL", "https://relay:sesame@login.example.com/token"),
        ("RELAY_KAFKA_SSL_CAFILE", "/nowhere/ca.crt"),
        ("RELAY_KAFKA_COMPRESSION", "brotli"),
        ("RELAY_SCHEMA_REGISTRY_URL", "localhost:8081"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://relay:sesame@localhost:8081"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://localhost:8081/?x"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://localhost:80810"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://localhost:port"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://registry..example.com"),
        ("RELAY_SCHEMA_REGISTRY_URL", "http://[::1:8081"),
        ("RELAY_SCHEMA_REGISTRY_SSL_CAFILE", "/nowhere/ca.crt"),
        ("RELAY_SCHEMA_FRAMING", "avro"),
        ("RELAY_SUBJECT_STRATEGY", "TopicName"),
        ("RELAY_SCHEMA_REGISTER", "2"),
        ("RELAY_SCHEMA_VALIDATION", "strict"),
        ("RELAY_SCHEMAS_DIR", "/nowhere"),
        ("RELAY_REDACT", "visitor.token"),
        ("RELAY_REDACT", "/a,b"),
        ("RELAY_DRAIN_SECONDS", """ 1"""),
        ("RELAY_LOG_LEVEL", "INFO"),
        ("RELAY_LOG_FORMAT", "xml"),
        ("RELAY_TOKEN_FILE", "/nowhere/token"),
    ],
)
def test_a_malformed_value_is_told_with_its_variable_and_nothing_else_is(name: str, text: str) -> None:
    environ = {"RELAY_ALLOW_UNAUTHENTICATED": "true"} | {name: text}
    (problem,) = problems(environ)
    assert problem.startswith(f"{name.removesuffix('_FILE')}: ")


def test_all_problems_are_told_at_once() -> None:
    found = problems(
        {"RELAY_HTTP_PORT": "x", "RELAY_ACK": "y", "RELAY_TOPICS": "z", "RELAY_LOG_LEVEL": "loud", "RELAY_REDACT": "a"}
    )
    assert [problem.partition(":")[0] for problem in found] == [
        "RELAY_TOPICS",
        "RELAY_HTTP_PORT",
        "RELAY_ACK",
        "RELAY_REDACT",
        "RELAY_LOG_LEVEL",
    ]


def test_an_unknown_name_is_told_with_the_one_that_may_be_meant() -> None:
    (problem,) = problems(NEEDED | {"RELAY_SPOOL_MAXBYTES": "1"})
    assert "RELAY_SPOOL_MAXBYTES" in problem
    assert "RELAY_SPOOL_MAX_BYTES" in problem
    (problem,) = problems(NEEDED | {"RELAY_XYZZY_QUUX_PLUGH": "1"})
    assert "RELAY_XYZZY_QUUX_PLUGH" in problem


def test_a_file_is_no_setting_where_the_value_is_no_secret() -> None:
    (problem,) = problems(NEEDED | {"RELAY_TOPIC_FILE": "/nowhere"})
    assert "RELAY_TOPIC_FILE" in problem


def test_names_of_others_are_not_looked_at() -> None:
    others = {"PATH": "/bin", "relay_http_port": "x", "MY_RELAY_TOPICS": "x", "RELAYS": "x"}
    assert Settings.read(NEEDED | others).effective() == DEFAULTS


def test_what_kubernetes_sets_for_a_service_called_relay_is_no_setting() -> None:
    links = {
        "RELAY_SERVICE_HOST": "10.0.0.1",
        "RELAY_SERVICE_PORT": "8080",
        "RELAY_SERVICE_PORT_HTTP": "8080",
        "RELAY_SERVICE_PORT_METRICS": "8081",
        "RELAY_PORT": "tcp://10.0.0.1:8080",
        "RELAY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "RELAY_PORT_8080_TCP_PROTO": "tcp",
        "RELAY_PORT_8080_TCP_PORT": "8080",
        "RELAY_PORT_8080_TCP_ADDR": "10.0.0.1",
    }
    assert Settings.read(NEEDED | links).effective() == DEFAULTS


# --- Secrets. ---


def test_no_secret_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from-a-file")
    settings = Settings.read(
        {
            "RELAY_TOKEN": "in-the-open",
            "RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "RELAY_KAFKA_SASL_USERNAME": "ada",
            "RELAY_KAFKA_SASL_PASSWORD_FILE": str(file),
        }
    )
    for shown in (str(settings.effective()), repr(settings), str(settings.token), str(settings.kafka_sasl_password)):
        assert "in-the-open" not in shown
        assert "from-a-file" not in shown
    effective = settings.effective()
    assert effective["RELAY_TOKEN"] == "********"
    assert effective["RELAY_KAFKA_SASL_USERNAME"] == "ada"
    assert effective["RELAY_KAFKA_SASL_PASSWORD"] == str(file)


def test_a_secret_s_file_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    settings = Settings.read({"RELAY_TOKEN_FILE": str(file)})
    assert settings.token is not None
    assert settings.token.read() == "first"
    file.write_text("second\nthird\n")
    assert settings.token.read() == "second\nthird"


def test_a_secret_is_set_in_one_place_only(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hidden")
    (problem,) = problems({"RELAY_TOKEN": "in-the-open", "RELAY_TOKEN_FILE": str(file)})
    assert problem.startswith("RELAY_TOKEN: ")
    assert "RELAY_TOKEN_FILE" in problem
    assert "in-the-open" not in problem


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe"])
def test_a_secret_s_file_without_a_secret_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    (problem,) = problems({"RELAY_TOKEN_FILE": str(file)})
    assert problem.startswith("RELAY_TOKEN")


@pytest.mark.parametrize(
    "name",
    [
        "RELAY_TOKEN",
        "RELAY_KAFKA_SASL_PASSWORD",
        "RELAY_SCHEMA_REGISTRY_PASSWORD",
        "RELAY_SCHEMA_REGISTRY_TOKEN",
    ],
)
def test_every_secret_may_come_from_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "secret"
    file.write_text("hidden")
    environ = NEEDED if name != "RELAY_TOKEN" else {}
    if name == "RELAY_SCHEMA_REGISTRY_PASSWORD":
        environ = environ | {"RELAY_SCHEMA_REGISTRY_USERNAME": "ada"}
    assert Settings.read(environ | {f"{name}_FILE": str(file)}).effective()[name] == str(file)


# --- What contradicts itself. ---


def test_without_a_token_there_is_no_start_unless_it_is_allowed(tmp_path: Path) -> None:
    (problem,) = problems({})
    assert problem.startswith("RELAY_TOKEN: ")
    assert "RELAY_ALLOW_UNAUTHENTICATED" in problem
    assert Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true"}).token is None
    assert Settings.read({"RELAY_WORKSPACES_DIR": str(tmp_path)}).token is None


@pytest.mark.parametrize(
    "environ",
    [
        {"RELAY_HTTP_TLS_CERTFILE": __file__},
        {"RELAY_HTTP_TLS_KEYFILE": __file__},
        {"RELAY_KAFKA_SSL_CERTFILE": __file__},
        {"RELAY_KAFKA_SSL_KEYFILE": __file__},
        {"RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"},
        {"RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "RELAY_KAFKA_SASL_USERNAME": "ada"},
        {"RELAY_KAFKA_SASL_TOKEN_URL": "https://login.example.com/token"},
        {"RELAY_KAFKA_SASL_TOKEN_SCOPE": "kafka"},
        {"RELAY_SCHEMA_FRAMING": "prefix"},
        {"RELAY_SCHEMA_FRAMING": "header"},
        {"RELAY_SCHEMA_REGISTRY_USERNAME": "ada"},
        {"RELAY_SCHEMA_REGISTRY_PASSWORD": "sesame"},
        {"RELAY_SCHEMA_REGISTRY_SSL_CERTFILE": __file__},
        {"RELAY_SCHEMA_REGISTRY_SSL_KEYFILE": __file__},
        {"RELAY_DEAD_LETTER_TOPIC": "rocketchat.omnichannel"},
        {"RELAY_WATERMARK_TOPIC": "rocketchat.omnichannel"},
        {"RELAY_TOPIC": "rocketchat.omnichannel.dead-letter"},
        {"RELAY_SPOOL_MAX_BYTES": "16777216"},
    ],
    ids="+".join,
)
def test_settings_that_contradict_each_other_are_told(environ: dict[str, str]) -> None:
    (problem,) = problems(NEEDED | environ)
    assert all(name in problem or name == "RELAY_KAFKA_SECURITY_PROTOCOL" for name in environ)


@pytest.mark.parametrize(
    ("given", "enough"),
    [
        ({}, False),
        ({"RELAY_KAFKA_SASL_PASSWORD": "a token"}, True),
        ({"RELAY_KAFKA_SASL_PASSWORD": "secret", "RELAY_KAFKA_SASL_TOKEN_URL": "https://a/"}, False),
        (
            {
                "RELAY_KAFKA_SASL_USERNAME": "ada",
                "RELAY_KAFKA_SASL_PASSWORD": "secret",
                "RELAY_KAFKA_SASL_TOKEN_URL": "https://a/",
            },
            True,
        ),
    ],
)
def test_oauthbearer_needs_a_token_or_what_gives_one(given: dict[str, str], enough: bool) -> None:
    oauth = {"RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "RELAY_KAFKA_SASL_MECHANISM": "OAUTHBEARER"}
    if enough:
        assert Settings.read(NEEDED | oauth | given).kafka_sasl_mechanism == "OAUTHBEARER"
    else:
        (problem,) = problems(NEEDED | oauth | given)
        assert problem.startswith("RELAY_KAFKA_SASL_USERNAME and RELAY_KAFKA_SASL_PASSWORD: ")


def test_a_registry_knows_the_relay_by_its_token_or_its_user_not_both() -> None:
    names = ("RELAY_SCHEMA_REGISTRY_USERNAME", "RELAY_SCHEMA_REGISTRY_PASSWORD", "RELAY_SCHEMA_REGISTRY_TOKEN")
    (problem,) = problems(NEEDED | dict.fromkeys(names, "x"))
    assert problem.startswith("RELAY_SCHEMA_REGISTRY_TOKEN and RELAY_SCHEMA_REGISTRY_USERNAME: ")


@pytest.mark.parametrize(("given", "in_force"), [("", "prefix"), ("none", "none"), ("header", "header")])
def test_with_a_registry_values_have_a_prefix_unless_another_framing_is_set(given: str, in_force: str) -> None:
    environ = {"RELAY_SCHEMA_REGISTRY_URL": "http://localhost:8081", "RELAY_SCHEMA_FRAMING": given}
    assert Settings.read(NEEDED | environ).effective()["RELAY_SCHEMA_FRAMING"] == in_force


def test_without_a_spool_its_size_is_free() -> None:
    assert Settings.read(NEEDED | {"RELAY_ACK": "kafka", "RELAY_SPOOL_MAX_BYTES": "1048576"}).ack == "kafka"


def test_settings_cannot_be_changed() -> None:
    settings = Settings.read(NEEDED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.http_port = 1  # type: ignore[misc]


# --- The table of the README. ---


def test_the_table_names_every_setting_with_default_and_meaning() -> None:
    lines = settings_table().splitlines()[2:]
    fields = dataclasses.fields(Settings)
    assert len(lines) == len(fields)
    for line, field in zip(lines, fields, strict=True):
        _, name, default, meaning, _ = line.split(" | ") if line.count(" | ") == 4 else ["", *line.split("|")[1:4], ""]
        assert f"`{variable(field.name)}`" in name
        assert (field.metadata["default"] or "") == default.strip().strip("`")
        assert meaning.strip()
        assert (f"`{variable(field.name)}_FILE`" in name) == field.metadata["secret"]
