"""A real Kafka that others than this machine reach, with the topics, the user and the listener that deploy/ expects."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import (  # type: ignore[attr-defined] # Its documented names, which it does not declare.
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from deploy.manifests import STRIMZI, load
from oracle import Sent, judge, read_topics

from relay.dev.java import reserve
from relay.dev.kafka import LocalKafka
from relay.dev.kafka_runtime import Runtime

USER, PASSWORD = "relay", "a-password-for-tests"
TOPIC, DEAD_LETTER_TOPIC = "rocketchat.omnichannel", "rocketchat.omnichannel.dead-letter"


@dataclass(frozen=True)
class KafkaForPods:
    """One broker: the test reaches it over the loopback, relays at *address* by SASL_SSL and SCRAM-SHA-512 as USER."""

    local: LocalKafka
    address: str
    ca_file: Path

    def kill(self) -> None:
        """SIGKILL: whoever asks for it is refused at once."""
        self.local.brokers[0].kill()

    def start(self) -> None:
        """Starts the killed broker on its data and ports; returns when it serves."""
        self.local.brokers[0].start()

    def judge(self, *sent_to: Sequence[Sent]) -> str:
        """
        Fails unless what was sent to each relay is on the topics as it should; returns how much that was.

        Each relay by itself: they know nothing of each other, and on one partition their sequences mix.
        """
        landed = read_topics(self.local.bootstrap_servers, TOPIC, DEAD_LETTER_TOPIC)
        bodies = [{event.body for event in sent} for sent in sent_to]
        verdicts = [
            judge(sent, [it for it in landed if it.value in of_relay], topic=TOPIC, dead_letter_topic=DEAD_LETTER_TOPIC)
            for sent, of_relay in zip(sent_to, bodies, strict=True)
        ]
        for verdict in verdicts:
            assert not verdict.faults, f"{verdict}: {verdict.faults}"
        strangers = [it.place for it in landed if it.value not in set().union(*bodies)]
        assert not strangers, f"sent by nobody: {strangers}"
        return "\n".join(map(str, verdicts))


@contextmanager
def kafka_for_pods(host: str, folder: Path, runtime: Runtime) -> Iterator[KafkaForPods]:
    """Yields a Kafka that is reached at the IP address *host*; its certificate and key are kept in *folder*."""
    key, certificate, both = (folder / name for name in ("kafka.key", "kafka.crt", "kafka.pem"))
    what = f"-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=kafka -addext subjectAltName=IP:{host}"
    command = ["openssl", "req", *what.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    local = LocalKafka(runtime=runtime)
    [broker] = local.brokers
    with reserve(0) as reserved:
        port = reserved.getsockname()[1]
        inside = f"PLAINTEXT://127.0.0.1:{broker.port}"
        local.properties |= {
            "listeners": f"{inside},CONTROLLER://127.0.0.1:{broker.controller_port},SASL_SSL://0.0.0.0:{port}",
            "advertised.listeners": f"{inside},SASL_SSL://{host}:{port}",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(both),
        }
        with local:
            _prepare(local)
            yield KafkaForPods(local, f"{host}:{port}", certificate)


def _prepare(kafka: LocalKafka) -> None:
    for topic in load(STRIMZI / "topics.yaml"):
        config = {name: str(value) for name, value in topic["spec"]["config"].items() if name != "min.insync.replicas"}
        kafka.create_topics(topic["metadata"]["name"], partitions=topic["spec"]["partitions"], config=config)
    user = UserScramCredentialUpsertion(
        USER, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), PASSWORD.encode()
    )
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for future in admin.alter_user_scram_credentials([user]).values():
        future.result(timeout=30)
