"""
The settings: declared once, read once from a mapping, every problem told at once.

The fields of Settings are the declaration: `http_port` is RELAY_HTTP_PORT. The README's table comes from it too.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from relay import values
from relay.errors import SettingsInvalid
from relay.values import Secret

PREFIX = "RELAY_"
# What Kubernetes puts into the environment for Services called "relay" or "relay-admin": not settings, not the user's.
_SERVICE_LINK = re.compile(
    r"RELAY_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)=.*|RELAY_(\w+_)?PORT=(tcp|udp)://.*",
    re.DOTALL,
)


_PORT = values.integer(0, 65535)


def _setting(parse: Callable[[str], Any], default: str | None, help_: str, *, secret: bool = False) -> Any:
    metadata = {"parse": parse, "default": default, "help": help_, "secret": secret}
    return dataclasses.field(metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a relay. Made by `read`; a field without a default may be None."""

    token: Secret | None = _setting(
        str,
        None,
        "The secret token(s) of `/rocketchat`, one per line: several are valid at once, for rotation",
        secret=True,
    )
    workspaces_dir: Path | None = _setting(
        values.directory, None, "One file per workspace: name = workspace, content = its token(s)"
    )
    allow_unauthenticated: bool = _setting(values.boolean, "false", "Must be `true` to start with no token at all")
    http_host: str = _setting(str, "127.0.0.1", "Address of the webhook port")
    http_port: int = _setting(_PORT, "8080", "Webhook port; 0 takes a free one and logs it")
    http_tls_certfile: Path | None = _setting(values.file, None, "Certificate chain for HTTPS on the webhook port")
    http_tls_keyfile: Path | None = _setting(values.file, None, "Its key; both are re-read when they change")
    admin_host: str = _setting(str, "0.0.0.0", "Address of the admin port")  # noqa: S104
    admin_port: int = _setting(_PORT, "8081", "Admin port: metrics, health, status")
    max_body_bytes: int = _setting(values.integer(1024, 1 << 29), "16777216", "Larger bodies are answered 413")
    ack: Literal["spool", "kafka"] = _setting(
        values.choice("spool", "kafka"),
        "spool",
        "What 200 means: `spool`: on disk; `kafka`: on all in-sync replicas, no disk",
    )
    delivery: Literal["exactly-once", "at-least-once"] = _setting(
        values.choice("exactly-once", "at-least-once"),
        "exactly-once",
        "`at-least-once`: idempotent producer, no transactions, no watermark topic",
    )
    spool_path: Path = _setting(Path, "./spool/relay.db", "The spool file; its directory is made")
    spool_max_bytes: int = _setting(values.integer(1 << 20), "1073741824", "A full spool answers 503")
    dedupe_window_seconds: float = _setting(
        values.seconds, "300", "How long an identical body counts as a retry; `0` switches it off"
    )
    topic: str = _setting(
        values.topic_template, "rocketchat.omnichannel", "Topic of the events; may hold `{type}` and `{workspace}`"
    )
    dead_letter_topic: str = _setting(values.topic, "rocketchat.omnichannel.dead-letter", "Topic of what is not valid")
    watermark_topic: str = _setting(
        values.topic, "rocketchat.omnichannel.watermarks", "Compacted topic: how far each spool has been published"
    )
    topic_create: bool = _setting(values.boolean, "false", "Create missing topics at start")
    kafka_bootstrap_servers: str = _setting(str, "localhost:9092", "Brokers to begin with, comma-separated")
    kafka_client_id: str = _setting(str, "relay", "Name of the relay in the brokers' logs and quotas")
    kafka_security_protocol: str = _setting(
        values.choice("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"), "PLAINTEXT", "How to connect to the brokers"
    )
    kafka_sasl_mechanism: str = _setting(
        values.choice("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"),
        "PLAIN",
        "How to log in, with a `SASL_` protocol: `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`, `OAUTHBEARER`",
    )
    kafka_sasl_username: str | None = _setting(str, None, "Who to log in as; the client id for a token URL")
    kafka_sasl_password: Secret | None = _setting(
        str, None, "The password; the client secret for a token URL; without that OAUTHBEARER's token", secret=True
    )
    kafka_sasl_token_url: str | None = _setting(
        values.http_url, None, "Where OAUTHBEARER gets its tokens, by client credentials"
    )
    kafka_sasl_token_scope: str | None = _setting(str, None, "The scope to ask for there")
    kafka_ssl_cafile: Path | None = _setting(values.file, None, "Certificates to trust; default: the system's")
    kafka_ssl_certfile: Path | None = _setting(values.file, None, "The relay's certificate, for mTLS")
    kafka_ssl_keyfile: Path | None = _setting(values.file, None, "Its key")
    kafka_compression: str = _setting(
        values.choice("none", "gzip", "lz4", "snappy", "zstd"),
        "zstd",
        "Of the records: `none`, `gzip`, `lz4`, `snappy`, `zstd`",
    )
    schema_registry_url: str | None = _setting(
        values.http_url, None, "Schema registry: base URL of its Confluent API, without user or password"
    )
    schema_registry_username: str | None = _setting(str, None, "Its user")
    schema_registry_password: Secret | None = _setting(str, None, "Its password", secret=True)
    schema_registry_token: Secret | None = _setting(str, None, "Bearer token, in place of a user", secret=True)
    schema_registry_ssl_cafile: Path | None = _setting(
        values.file, None, "Certificates to trust; default: the system's"
    )
    schema_registry_ssl_certfile: Path | None = _setting(values.file, None, "The relay's certificate, for mTLS")
    schema_registry_ssl_keyfile: Path | None = _setting(values.file, None, "Its key")
    schema_framing: Literal["none", "prefix", "header"] = _setting(
        values.choice("none", "prefix", "header"),
        None,
        "How a value names its schema: `none` (default without a registry), `prefix` (default with one), `header`",
    )
    subject_strategy: Literal["topic-record", "record", "topic"] = _setting(
        values.choice("topic-record", "record", "topic"),
        "topic-record",
        "Subjects: `{topic}-{ce_type}`, record or topic",
    )
    schema_register: bool = _setting(values.boolean, "true", "Register the schemas at start; `false`: look up only")
    schema_validation: Literal["enforce", "report", "off"] = _setting(
        values.choice("enforce", "report", "off"),
        "enforce",
        "Invalid events: to the dead letters; published with `relay_schema_error`; not looked at",
    )
    schemas_dir: Path | None = _setting(
        values.directory, None, "Schema files that add to the shipped ones or replace them"
    )
    redact: tuple[str, ...] = _setting(
        values.pointers,
        "",
        "JSON pointers, comma-separated, `*` for array items: replaced by `[redacted]` before the spool",
    )
    drain_seconds: float = _setting(values.seconds, "20", "How long a stop waits for the spool to reach Kafka")
    log_level: str = _setting(values.choice("debug", "info", "warning", "error"), "info", "From which level on to log")
    log_format: str = _setting(values.choice("json", "text"), "json", "`json` or `text`")

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "Settings":
        """
        The settings in *environ*.

        Raises: SettingsInvalid, with every problem there is.
        """
        environ = {name: value for name, value in environ.items() if not _SERVICE_LINK.fullmatch(f"{name}={value}")}
        problems = list(_unknown(environ))
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            try:
                found[field.name] = _value(field, environ)
            except ValueError as error:
                problems.append(f"{variable(field.name)}: {error}.")
                found[field.name] = None
        # The one default that another setting decides.
        found["schema_framing"] = found["schema_framing"] or ("prefix" if found["schema_registry_url"] else "none")
        settings = cls(**found)
        if not problems:  # What settings say of each other, once each says something.
            problems += settings._contradictions()
        if problems:
            raise SettingsInvalid(problems)
        return settings

    def _contradictions(self) -> list[str]:
        checks = {
            "RELAY_TOKEN: set it (or RELAY_TOKEN_FILE, or RELAY_WORKSPACES_DIR) to the secret token of Rocket.Chat's "
            "webhook settings; `relay token new` makes one. RELAY_ALLOW_UNAUTHENTICATED=true accepts anybody's.": (
                self.token or self.workspaces_dir or self.allow_unauthenticated
            ),
            "RELAY_HTTP_TLS_CERTFILE and RELAY_HTTP_TLS_KEYFILE: set both or none.": (
                bool(self.http_tls_certfile) == bool(self.http_tls_keyfile)
            ),
            "RELAY_KAFKA_SSL_CERTFILE and RELAY_KAFKA_SSL_KEYFILE: set both or none.": (
                bool(self.kafka_ssl_certfile) == bool(self.kafka_ssl_keyfile)
            ),
            f"RELAY_KAFKA_SASL_USERNAME and RELAY_KAFKA_SASL_PASSWORD: needed for {self.kafka_security_protocol}.": (
                not self.kafka_security_protocol.startswith("SASL")
                or (self.kafka_sasl_password and (self.kafka_sasl_username or self._token_is_given))
            ),
            "RELAY_KAFKA_SASL_TOKEN_URL: is for RELAY_KAFKA_SASL_MECHANISM=OAUTHBEARER alone.": (
                not self.kafka_sasl_token_url or self.kafka_sasl_mechanism == "OAUTHBEARER"
            ),
            "RELAY_KAFKA_SASL_TOKEN_SCOPE: is for a RELAY_KAFKA_SASL_TOKEN_URL alone.": (
                bool(self.kafka_sasl_token_url) or not self.kafka_sasl_token_scope
            ),
            "RELAY_TOPIC, RELAY_DEAD_LETTER_TOPIC and RELAY_WATERMARK_TOPIC: must be three different topics.": (
                len({self.topic, self.dead_letter_topic, self.watermark_topic}) == 3
            ),
            "RELAY_SPOOL_MAX_BYTES: must be larger than RELAY_MAX_BODY_BYTES.": (
                self.ack == "kafka" or self.spool_max_bytes > self.max_body_bytes
            ),
            f"RELAY_SCHEMA_REGISTRY_URL: needed for RELAY_SCHEMA_FRAMING={self.schema_framing}.": (
                bool(self.schema_registry_url) or self.schema_framing == "none"
            ),
            "RELAY_SCHEMA_REGISTRY_USERNAME and RELAY_SCHEMA_REGISTRY_PASSWORD: set both or none.": (
                bool(self.schema_registry_username) == bool(self.schema_registry_password)
            ),
            "RELAY_SCHEMA_REGISTRY_TOKEN and RELAY_SCHEMA_REGISTRY_USERNAME: set one of them.": (
                not (self.schema_registry_token and self.schema_registry_username)
            ),
            "RELAY_SCHEMA_REGISTRY_SSL_CERTFILE and RELAY_SCHEMA_REGISTRY_SSL_KEYFILE: set both or none.": (
                bool(self.schema_registry_ssl_certfile) == bool(self.schema_registry_ssl_keyfile)
            ),
        }
        return [problem for problem, holds in checks.items() if not holds]

    @property
    def _token_is_given(self) -> bool:
        return self.kafka_sasl_mechanism == "OAUTHBEARER" and not self.kafka_sasl_token_url

    def effective(self) -> dict[str, str]:
        """Every variable with its value in force, secrets masked."""
        return {variable(field.name): _shown(getattr(self, field.name)) for field in dataclasses.fields(self)}


def variable(field_name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field_name.upper()


def settings_table() -> str:
    """The settings as the README's table."""
    rows = ["| Name | Default | |", "|---|---|---|"]
    for field in dataclasses.fields(Settings):
        name = f"`{variable(field.name)}`"
        if field.metadata["secret"]:
            name += f", `{variable(field.name)}_FILE`"
        default = field.metadata["default"]
        rows.append(f"| {name} | {f'`{default}`' if default else ''} | {field.metadata['help']} |")
    return "\n".join(rows)


def _value(field: "dataclasses.Field[Any]", environ: Mapping[str, str]) -> Any:
    name, metadata = variable(field.name), field.metadata
    text = environ.get(name)
    if metadata["secret"]:
        path = environ.get(f"{name}_FILE")
        if text and path:
            raise ValueError(f"set it or {name}_FILE, not both")
        if path:
            try:
                secret = Secret(path=values.file(path))
                if secret.read():
                    return secret
            except (OSError, ValueError) as error:
                raise ValueError(f"by {name}_FILE: {error}") from None
            raise ValueError(f"by {name}_FILE: {path} is empty")
        return Secret(text) if text else None
    # An empty variable is how a template leaves a setting out.
    text = text or metadata["default"]
    return None if text is None else metadata["parse"](text)


def _unknown(environ: Mapping[str, str]) -> Iterable[str]:
    known = {variable(field.name) for field in dataclasses.fields(Settings)}
    known |= {f"{variable(field.name)}_FILE" for field in dataclasses.fields(Settings) if field.metadata["secret"]}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield f"{name}: there is no such setting{f'; {near[0]} is meant?' if near else '.'}"


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
