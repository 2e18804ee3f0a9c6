"""A real Kafka with an authorizer, a listener for each way to be let in, and certificates good and bad."""

import base64
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import trustme
import yaml
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from relay.dev.java import reserve
from relay.dev.kafka import LocalKafka
from relay.dev.kafka_runtime import Runtime

#: Who logs in by PLAIN, and by the certificate `relay`.
USER, PASSWORD = "relay", "s3same-Open,=1"
#: Sessions of these mechanisms are ended by the broker after so many milliseconds.
REAUTHENTICATION = {"scram-sha-256": 2000, "oauthbearer": 2000}

_KAFKA_USER = Path(__file__).parents[1] / "deploy" / "strimzi" / "user.yaml"
_TOPIC = "rocketchat.omnichannel"
_MODULES = {
    "plain": f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";',
    "scram-sha-256": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    "scram-sha-512": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
    "oauthbearer": (
        "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required "
        'unsecuredLoginStringClaim_sub="broker";'
    ),
}


class Acl(NamedTuple):
    """One operation of the KafkaUser's ACLs."""

    resource: str
    name: str
    pattern: str
    operation: str

    def binding(self, user: str) -> AclBinding:
        """The ACL for *user*."""
        return AclBinding(
            *self._resource(), f"User:{user}", "*", AclOperation[_constant(self.operation)], AclPermissionType.ALLOW
        )

    def filter(self, user: str) -> AclBindingFilter:
        """What finds that ACL."""
        return AclBindingFilter(
            *self._resource(), f"User:{user}", "*", AclOperation[_constant(self.operation)], AclPermissionType.ALLOW
        )

    def _resource(self) -> tuple[Any, str, Any]:
        pattern = {"literal": ResourcePatternType.LITERAL, "prefix": ResourcePatternType.PREFIXED}[self.pattern]
        return ResourceType[_constant(self.resource)], self.name, pattern


def shipped_acls(topic: str = _TOPIC) -> list[Acl]:
    """The ACLs of deploy/strimzi, for topics whose names begin with *topic*."""
    user = yaml.safe_load(_KAFKA_USER.read_text())
    return [
        Acl(
            it["resource"]["type"],
            it["resource"]["name"].replace(_TOPIC, topic),
            it["resource"]["patternType"],
            operation,
        )
        for it in user["spec"]["authorization"]["acls"]
        for operation in it["operations"]
    ]


class SecuredKafka:
    """
    The broker and its certificates, as a context manager.

    Whoever comes over PLAINTEXT may do everything: for the tests themselves.
    """

    def __init__(self, directory: Path, runtime: Runtime) -> None:
        self._directory = directory
        self.authority = trustme.CA()
        self.cafile = self._write("ca", self.authority.cert_pem.bytes())
        self.other_cafile = self._write("other-ca", trustme.CA().cert_pem.bytes())
        self.local = LocalKafka(runtime=runtime)
        (broker,) = self.local.brokers
        self._reserved = {name: reserve(0) for name in ("SASL_SSL", "SSL", "EXPIRED")}
        self.ports = {name: reserved.getsockname()[1] for name, reserved in self._reserved.items()}
        listeners = {"PLAINTEXT": broker.port, "CONTROLLER": broker.controller_port, **self.ports}
        self.local.properties |= {
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items()),
            "listener.security.protocol.map": (
                "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,EXPIRED:SSL"
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._for_java("broker")),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.cafile),
            "listener.name.ssl.ssl.client.auth": "required",
            "listener.name.ssl.ssl.principal.mapping.rules": "RULE:^.*CN=([^,]+).*$/$1/",
            "listener.name.expired.ssl.keystore.type": "PEM",
            "listener.name.expired.ssl.keystore.location": str(self._for_java("expired", expired=True)),
            "listener.name.sasl_ssl.sasl.enabled.mechanisms": ",".join(name.upper() for name in _MODULES),
            **{f"listener.name.sasl_ssl.{name}.sasl.jaas.config": module for name, module in _MODULES.items()},
            **{
                f"listener.name.sasl_ssl.{name}.connections.max.reauth.ms": str(milliseconds)
                for name, milliseconds in REAUTHENTICATION.items()
            },
        }

    def __enter__(self) -> Self:
        self.local.start()
        self._admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        return self

    def __exit__(self, *_: object) -> None:
        self.local.stop()
        for reserved in self._reserved.values():
            reserved.close()

    # --- Who may come in. ---

    @property
    def bootstrap_servers(self) -> str:
        """Where the tests themselves connect to."""
        return self.local.bootstrap_servers

    def add_user(self, user: str, password: str, mechanism: str = "SCRAM-SHA-512") -> None:
        """Gives *user* a password, or another one."""
        info = ScramCredentialInfo(ScramMechanism[_constant(mechanism)], 4096)
        _done(self._admin.alter_user_scram_credentials([UserScramCredentialUpsertion(user, info, password.encode())]))

    def allow(self, user: str, acls: Iterable[Acl]) -> None:
        """Gives *user* these rights."""
        _done(self._admin.create_acls([acl.binding(user) for acl in acls]))

    def deny(self, user: str, acl: Acl) -> None:
        """Takes that one away."""
        (taken,) = _done(self._admin.delete_acls([acl.filter(user)]))
        assert len(taken) == 1, taken

    def certificate(self, name: str, *, expired: bool = False) -> Mapping[str, str]:
        """The settings of a relay with a certificate for *name*."""
        issued = self._issue(common_name=name, expired=expired)
        place = f"{name}-{uuid.uuid4().hex}"
        return {
            "RELAY_KAFKA_SSL_CERTFILE": str(self._write(place, *(it.bytes() for it in issued.cert_chain_pems))),
            "RELAY_KAFKA_SSL_KEYFILE": str(self._write(f"{place}-key", issued.private_key_pem.bytes())),
        }

    def _issue(self, *, common_name: str, expired: bool) -> trustme.LeafCert:
        until = datetime(2020, 1, 1, tzinfo=UTC) if expired else None
        since = datetime(2019, 1, 1, tzinfo=UTC) if expired else None
        return self.authority.issue_cert("127.0.0.1", common_name=common_name, not_before=since, not_after=until)

    def _for_java(self, name: str, *, expired: bool = False) -> Path:
        issued = self._issue(common_name=name, expired=expired)
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self._write(name, pkcs8, *(it.bytes() for it in issued.cert_chain_pems))

    def _write(self, name: str, *pems: bytes) -> Path:
        path = self._directory / f"{name}.pem"
        path.write_bytes(b"".join(pems))
        return path


def unsecured_jwt(subject: str, *, seconds: float = 3600) -> str:
    """A token that Kafka's validator for development accepts."""
    parts = ({"alg": "none"}, {"sub": subject, "iat": int(time.time()) - 1, "exp": int(time.time() + seconds)})
    coded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return ".".join([*coded, ""])


def _constant(name: str) -> str:
    """DescribeConfigs, transactionalId, SCRAM-SHA-512: as constants."""
    spelled = "".join(f"_{letter}" if letter.isupper() and name != name.upper() else letter for letter in name)
    return spelled.lstrip("_").replace("-", "_").upper()


def _done(futures: Mapping[Any, Future[Any]]) -> list[Any]:
    return [future.result(30) for future in futures.values()]
