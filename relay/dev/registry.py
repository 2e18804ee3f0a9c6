"""
A real schema registry on this machine, from nothing but Python packages: for `relay dev --registry` and the tests.

It is Apicurio Registry behind its Confluent API. Unlike Confluent's it has no GUIDs, takes no mode seriously, and wants
`$schema` or `properties` in a schema.
"""

import atexit
import contextlib
import http.client
import json
import shutil
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from relay.dev.download import Progress, cache_dir, digest_of, exclusive, install, read_lock
from relay.dev.java import Java, JavaProcess, class_archive, find_java, reserve
from relay.errors import RelayError

_LOCK = Path(__file__).with_name("registry.lock")
_HOST = "127.0.0.1"
_API = "/apis/ccompat/v7"
_JAVA = 21
_OPTIONS = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Djava.awt.headless=true")
_PROPERTIES = {
    # As Confluent's does without being told: refuse what is no schema, and BACKWARD where a subject does not say.
    "apicurio.rules.global.validity": "FULL",
    "apicurio.rules.global.compatibility": "BACKWARD",
    # For one relay, not for a company: 20 connections to the database cost time at every start.
    "apicurio.datasource.jdbc.initial-size": "1",
    "apicurio.datasource.jdbc.min-size": "1",
}
_SCHEMA = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {}}


class RegistryUnusableError(RelayError):
    """The local schema registry could not be made ready."""


@dataclass(frozen=True)
class RegistryRuntime:
    """What all registries on this machine are started from."""

    java: Java
    jar: Path
    options: tuple[str, ...] = ()

    def command(self, properties: Mapping[str, str], *, heap_megabytes: int) -> list[str]:
        """Return the command line that runs a registry with these *properties*."""
        settings = [f"-D{name}={value}" for name, value in properties.items()]
        options = (f"-Xmx{heap_megabytes}m", *_OPTIONS, *self.options)
        return [str(self.java.executable), *options, *settings, "-jar", str(self.jar)]


class LocalRegistry(JavaProcess):
    """
    A schema registry on the loopback interface, as a context manager or with start() and close().

    It may be stopped, killed, frozen and started again: its address and its subjects stay until close(). *data_dir*
    keeps the subjects beyond that. *properties* are Apicurio's, over the defaults here, and are read at each start. The
    registry does not outlive this process. Every method may be called from any thread.
    """

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        properties: Mapping[str, str] | None = None,
        heap_megabytes: int = 256,
        on_progress: Progress | None = None,
        runtime: RegistryRuntime | None = None,
    ) -> None:
        self.properties = dict(properties or {})
        self._keep = data_dir is not None
        self._home = data_dir or Path(tempfile.gettempdir(), f"relay-registry-{uuid.uuid4().hex}")
        super().__init__(self._prepared_command, self._home / "registry.log")
        self._heap_megabytes = heap_megabytes
        self._on_progress = on_progress
        self._runtime = runtime
        self._reserved = [reserve(0), reserve(0)]
        self.port, self._health_port = (reserved.getsockname()[1] for reserved in self._reserved)

    @property
    def url(self) -> str:
        """The base URL of the Confluent API."""
        return f"http://{_HOST}:{self.port}{_API}"

    def start(self, *, wait: bool = True) -> None:
        """
        Start the registry unless it runs; with *wait*, return when it serves.

        The very first start on a machine downloads it: *on_progress* is told.

        Raises:
            JavaNotFoundError, DownloadError: it cannot be had.
            RegistryUnusableError: it ended, or did not serve within 90 s; with the end of its log.
        """
        self._runtime = self._runtime or prepare_registry(self._on_progress)
        if not self._reserved:
            self._reserved = [reserve(self.port), reserve(self._health_port)]
        self._home.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        super().start()
        if wait:
            self.wait_until_ready()

    def restart(self) -> None:
        """Stop the registry cleanly if it runs, and start it again."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the registry, give its ports back, and throw its subjects away unless *data_dir* was given."""
        atexit.unregister(self.close)
        if not self._keep:
            self.kill()
        self.stop(timeout=15)
        while self._reserved:
            self._reserved.pop().close()
        if not self._keep:
            shutil.rmtree(self._home, ignore_errors=True)

    def wait_until_ready(self, seconds: float = 90) -> None:
        """
        Return when the registry serves.

        Raises:
            RegistryUnusableError: as start().
        """
        deadline = time.monotonic() + seconds
        while _ask(self._health_port, "GET", "/health/ready") != 200:
            if not self.running or time.monotonic() > deadline:
                what = f"was not ready in {seconds:.0f} s" if self.running else "ended"
                raise RegistryUnusableError(f"The registry {what}. Its log ends:\n{self.log_tail()}")
            time.sleep(0.03)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepared_command(self) -> list[str]:
        assert self._runtime is not None
        if sys.platform != "linux":  # Elsewhere a bound socket keeps the registry out, too.
            while self._reserved:
                self._reserved.pop().close()
        properties = {
            **_PROPERTIES,
            "quarkus.http.host": _HOST,
            "quarkus.http.port": str(self.port),
            "quarkus.management.host": _HOST,
            "quarkus.management.port": str(self._health_port),
            # Without the delay a killed registry still has every schema that it gave an id.
            "apicurio.datasource.url": f"jdbc:h2:file:{self._home.absolute()}/subjects;WRITE_DELAY=0",
            **self.properties,
        }
        return self._runtime.command(properties, heap_megabytes=self._heap_megabytes)


def prepare_registry(on_progress: Progress | None = None) -> RegistryRuntime:
    """
    Return what registries are started from; the first time by downloading it and starting a registry once.

    Raises:
        JavaNotFoundError, DownloadError: it cannot be had; the message says what to do.
    """
    java = find_java(_JAVA)
    artifacts = read_lock(_LOCK)
    home = cache_dir() / f"registry-{digest_of(artifacts)[:12]}"
    (tarball,) = install(artifacts, home, on_progress=on_progress)
    application = home / "application"
    runtime = RegistryRuntime(java, application / "quarkus-run.jar")
    if not application.exists():
        with exclusive(home.with_name(f"{home.name}.lock")):
            if not application.exists():
                _unpack(tarball, application)

    def train(option: str) -> bool:
        if on_progress:
            on_progress(len(artifacts), len(artifacts), "one start, to make the others quick")
        return _train(replace(runtime, options=(option,)))

    return replace(runtime, options=class_archive(java, home, train))


def _unpack(tarball: Path, into: Path) -> None:
    partial = into.with_name(f"{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(tarball) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)  # Since 3.11.4.
        tar.extractall(partial)  # noqa: S202 (filtered above, and its digest is pinned)
    partial.rename(into)
    tarball.unlink()


def _train(runtime: RegistryRuntime) -> bool:
    """Go once through what every registry does; returns whether it ended cleanly, and so left an archive."""
    with contextlib.suppress(RegistryUnusableError), LocalRegistry(runtime=runtime) as registry:
        body = json.dumps({"schemaType": "JSON", "schema": json.dumps(_SCHEMA)})
        for path in ("/subjects/first/versions", "/subjects/first", "/compatibility/subjects/first/versions"):
            _ask(registry.port, "POST", f"{_API}{path}?normalize=true", body)
        return registry.stop(timeout=120)
    return False


def _ask(port: int, method: str, path: str, body: str | None = None) -> int | None:
    """Return the status of the answer, or None if there is none within 5 s."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
