"""What brokers are started from: Kafka's jars, a Java, a formatted storage, and an archive that makes starts quick."""

import os
import shutil
import subprocess
import tempfile
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from relay.dev.download import Progress, cache_dir, digest_of, install, read_lock
from relay.dev.java import Java, class_archive, find_java
from relay.errors import RelayError

_LOCK = Path(__file__).with_name("kafka.lock")
_CHECKPOINT = "bootstrap.checkpoint"
_OPTIONS = (
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Djava.awt.headless=true",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.common.config=warn",  # All 300 settings at each start.
)


class KafkaUnusableError(RelayError):
    """The local Kafka could not be made ready."""


@dataclass(frozen=True)
class Runtime:
    """What all brokers on this machine have in common."""

    java: Java
    jars: tuple[Path, ...]
    options: tuple[str, ...] = ()

    def command(self, *arguments: str, heap_megabytes: int = 512) -> list[str]:
        """Return the command line that runs a class of Kafka's: its name and its arguments."""
        options = (f"-Xmx{heap_megabytes}m", *_OPTIONS, *self.options)
        return [str(self.java.executable), *options, "-cp", os.pathsep.join(map(str, self.jars)), *arguments]

    def format(self, storage: Path, cluster_id: str, node_id: int) -> None:
        """
        Make the directory *storage* fit for a broker's first start; one that is formatted stays as it is.

        Kafka's own tool needs a second for it. Only what that decides, the feature levels of this version, is taken
        from it, once; the rest is these four lines.
        """
        properties = storage / "meta.properties"
        if not properties.exists():
            storage.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._checkpoint(), storage / _CHECKPOINT)
            lines = ("version=1", f"cluster.id={cluster_id}", f"node.id={node_id}", f"directory.id={new_id()}", "")
            properties.write_text("\n".join(lines))

    def _checkpoint(self) -> Path:
        checkpoint = self.jars[0].with_name(_CHECKPOINT)
        if not checkpoint.exists():
            with tempfile.TemporaryDirectory(dir=checkpoint.parent) as directory:
                config = Path(directory, "server.properties")
                config.write_text(
                    "process.roles=broker,controller\nnode.id=0\ncontroller.quorum.voters=0@localhost:1\n"
                    "listeners=PLAINTEXT://localhost:2,CONTROLLER://localhost:1\n"
                    f"controller.listener.names=CONTROLLER\nlog.dirs={directory}\n"
                )
                tool = ("kafka.tools.StorageTool", "format", "--config", str(config), "--cluster-id", new_id())
                done = subprocess.run(self.command(*tool), capture_output=True, text=True, timeout=60, check=False)
                if done.returncode != 0:
                    raise KafkaUnusableError(f"Kafka's storage could not be formatted:\n{done.stdout}{done.stderr}")
                Path(directory, _CHECKPOINT).rename(checkpoint)
        return checkpoint


def new_id() -> str:
    """Return a random id in the form Kafka uses for clusters and directories."""
    return urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def prepare(train: Callable[[Runtime], bool], on_progress: Progress | None = None) -> Runtime:
    """
    Return the runtime; at the first time by downloading it, and having *train* start a broker once and stop it cleanly.

    Raises:
        JavaNotFoundError, DownloadError, KafkaUnusableError: it cannot be had; the message says what to do.
    """
    java = find_java()
    artifacts = read_lock(_LOCK)
    home = cache_dir() / f"kafka-{digest_of(artifacts)[:12]}"
    runtime = Runtime(java, tuple(install(artifacts, home, on_progress=on_progress)))

    def train_with(option: str) -> bool:
        if on_progress:
            on_progress(len(artifacts), len(artifacts), "one start, to make the others quick")
        return train(replace(runtime, options=(option,)))

    return replace(runtime, options=class_archive(java, home, train_with))
