"""
The running relay: builds the parts, starts and stops them in order, owns the signals.

The one place that names the concrete classes. Start: spool, ports, publisher; an event is accepted before Kafka is
looked for. Stop: refuse new deliveries, let those under way finish, wait for the spool to reach Kafka, close.

Longer than other modules: every part is named here, and nowhere else.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from relay import __version__, admin
from relay.auth import Tokens
from relay.clients import connection, registry
from relay.config import Settings
from relay.errors import RelayError, SettingsInvalid
from relay.framer import Framer, wanted
from relay.framing import fingerprint
from relay.ingress import Ingress
from relay.kafka import Producer, TopicPlan
from relay.listening import listen
from relay.memory import MemoryQueue
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import RECORD_OVERHEAD, RecordMaker, Topics
from relay.redact import Redaction
from relay.requeue import requeue_what_is_requested
from relay.schema_ids import SchemaIds
from relay.schemas import Schemas
from relay.spool import Spool
from relay.tls import Certificate

log = logging.getLogger(__name__)

#: Seconds between two looks at the certificate's files.
_CERTIFICATE_SECONDS = 10.0
_GC_THRESHOLD = (20_000, 20, 20)
#: For glibc's mallopt.
_M_ARENA_MAX = -8
#: Seconds for answers that are under way when the ports close.
_FINISH_SECONDS = 5.0


class Service:
    """One relay."""

    def __init__(self, settings: Settings) -> None:
        """
        Reads what the settings point to.

        Raises: SettingsInvalid.
        """
        self._settings = settings
        self._schemas = Schemas.load(settings.schemas_dir)
        self._metrics = Metrics(CollectorRegistry(), self._schemas.types)
        self._topics = Topics(settings.topic, settings.dead_letter_topic, self._schemas.types)
        self._fingerprints = {it.rocketchat_type: fingerprint(it.text) for it in self._schemas}
        self._registry = registry(settings)
        self._ids: SchemaIds | None = None
        #: Workspaces that were taken out of the settings while events of theirs waited for schema ids.
        self._retired: set[str] = set()
        self._started_at = time.time()
        self._failure: RelayError | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listens = asyncio.Event()
        try:
            self._tokens = Tokens(settings.token, settings.workspaces_dir, on_change=self._workspaces_changed)
            self._certificate = (
                Certificate(settings.http_tls_certfile, settings.http_tls_keyfile)
                if settings.http_tls_certfile and settings.http_tls_keyfile
                else None
            )
        except (OSError, ValueError) as error:
            raise SettingsInvalid([str(error)]) from error
        self._topics.check(self._tokens.workspaces, settings.watermark_topic)
        self._store: Spool | MemoryQueue
        self._publisher: Publisher
        self._ingress: Ingress
        #: The ports in use, once they are open: webhook and admin.
        self.ports: tuple[int, int] = (0, 0)

    def stop(self) -> None:
        """Begins the stop; asked a second time it waits for nothing any more."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def connected(self) -> None:
        """Returns when the ports are open and Kafka takes events."""
        await self._listens.wait()
        await self._publisher.started.wait()

    async def run(self) -> None:
        """
        Serves until `stop`, or until SIGTERM or SIGINT.

        Raises: SpoolUnusable; RelayError if a port is taken or a part of it died.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        # Nothing here makes reference cycles by the event: looking for them at the default pace costs 5 % of the CPU.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLD)
        _share_one_heap()
        async with self._open_store() as store, self._publishing(store), self._listening(store):
            log.info(
                "Serving deliveries on port %d, admin on port %d.",
                *self.ports,
                extra={"action": "serving", "version": __version__, "ports": self.ports, "spooled": store.depth},
            )
            self._listens.set()
            await self._stop.wait()
            await self._drain(store)
        log.info("Stopped.", extra={"action": "stopped"})
        if self._failure:
            raise self._failure

    @asynccontextmanager
    async def _open_store(self) -> AsyncIterator[Spool | MemoryQueue]:
        settings, metrics = self._settings, self._metrics
        if settings.ack == "kafka":
            self._store = MemoryQueue(dedupe_seconds=settings.dedupe_window_seconds)
        else:
            self._store = await Spool.open(
                settings.spool_path,
                max_bytes=settings.spool_max_bytes,
                dedupe_seconds=settings.dedupe_window_seconds,
                metrics=metrics,
            )
            metrics.spool_capacity_bytes.set(settings.spool_max_bytes)
        store = self._store
        metrics.spool_events.set_function(lambda: store.depth)
        metrics.spool_bytes.set_function(lambda: store.used_bytes)
        metrics.spool_oldest_event_age.set_function(lambda: store.oldest_age)
        metrics.spool_dead_events.set_function(lambda: len(store.dead))
        try:
            yield store
        finally:
            await store.close()

    @asynccontextmanager
    async def _publishing(self, store: Spool | MemoryQueue) -> AsyncIterator[None]:
        settings = self._settings
        exactly_once = settings.delivery == "exactly-once"

        def connect() -> Producer:
            plan = TopicPlan(
                self._topics.all(self._tokens.workspaces),
                settings.watermark_topic if exactly_once else None,
                create=settings.topic_create,
                max_message_bytes=settings.max_body_bytes + RECORD_OVERHEAD,
            )
            compression = None if settings.kafka_compression == "none" else settings.kafka_compression
            return Producer(connection(settings), plan, store.identity, compression)

        self._ids = self._schema_ids(store)
        framer = self._framer(self._ids) if self._ids else None
        records = RecordMaker(self._topics, self._data_schema, framer)
        self._publisher = Publisher(store, connect, records, self._metrics, framer)
        tasks = [asyncio.create_task(self._publisher.run(), name="publisher")]
        if self._ids:
            tasks.append(asyncio.create_task(self._ids.run(), name="schema ids"))
        if isinstance(store, Spool):
            tasks.append(asyncio.create_task(requeue_what_is_requested(store), name="requeue"))
        for task in tasks:
            task.add_done_callback(self._task_ended)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _schema_ids(self, store: Spool | MemoryQueue) -> SchemaIds | None:
        settings = self._settings
        if self._registry is None:
            return None
        return SchemaIds(
            self._registry,
            store,
            framing=settings.schema_framing,
            register=settings.schema_register,
            wanted=lambda: wanted(settings.subject_strategy, self._topics, self._workspaces, self._schemas),
            metrics=self._metrics,
        )

    @property
    def _workspaces(self) -> list[str]:
        """Whose events there may be."""
        return sorted(self._retired.union(self._tokens.workspaces))

    def _framer(self, ids: SchemaIds) -> Framer | None:
        if self._settings.schema_framing == "none":
            return None  # Registered all the same, for consumers that look schemas up by name.
        judge = None if self._settings.schema_validation == "off" else self._schemas.judge
        enforce = self._settings.schema_validation == "enforce"
        strategy = self._settings.subject_strategy
        return Framer(ids, self._topics, strategy, self._fingerprints, judge, enforce=enforce, retired=self._retired)

    @asynccontextmanager
    async def _listening(self, store: Spool | MemoryQueue) -> AsyncIterator[None]:
        settings = self._settings
        self._ingress = Ingress(
            tokens=self._tokens,
            store=store,
            types=self._schemas.types,
            fingerprints=self._fingerprints,
            schemas=None if settings.schema_validation == "off" else self._schemas,
            enforce=settings.schema_validation == "enforce",
            redaction=Redaction(settings.redact),
            max_body_bytes=settings.max_body_bytes,
            metrics=self._metrics,
        )
        app = admin.application(registry=self._metrics.registry, unready=self._unready, status=self._status)
        webhook = web.ServerRunner(self._ingress.server(), shutdown_timeout=_FINISH_SECONDS)
        console = web.AppRunner(app, access_log=None)
        reload = asyncio.create_task(self._reload_certificate(), name="certificate")
        try:
            await webhook.setup()
            await console.setup()
            context = self._certificate.context if self._certificate else None
            host, port = settings.http_host, settings.http_port
            with _opening(host, port, "RELAY_HTTP"):
                await listen(webhook, host, port, context)
            host, port = settings.admin_host, settings.admin_port
            with _opening(host, port, "RELAY_ADMIN"):
                await web.TCPSite(console, host, port).start()
            self.ports = (webhook.addresses[0][1], console.addresses[0][1])
            yield
        finally:
            reload.cancel()
            await webhook.cleanup()
            await console.cleanup()

    async def _drain(self, store: Spool | MemoryQueue) -> None:
        self._ingress.draining = True
        log.info(
            "Stopping: %d events wait for Kafka, for %g s at most.",
            store.depth,
            self._settings.drain_seconds,
            extra={"action": "draining", "events": store.depth},
        )
        hurried = asyncio.create_task(self._hurry.wait(), name="hurried")
        # What is under way may still be answered 200, and is then to be published too.
        for stage, seconds in (
            (self._ingress.settled(), _FINISH_SECONDS),
            (store.drained(), self._settings.drain_seconds),
        ):
            task = asyncio.create_task(stage)
            await asyncio.wait({task, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
        hurried.cancel()
        if store.depth:
            log.warning(
                "%d events are %s.",
                store.depth,
                "still in the spool; the next start publishes them"
                if self._settings.ack == "spool"
                else "not confirmed by Kafka, nor answered 200",
                extra={"action": "not_drained", "events": store.depth},
            )

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            extra = {"action": "task_died", "task": task.get_name()}
            log.error("The task '%s' has died.", task.get_name(), exc_info=task.exception(), extra=extra)
            self._failure = RelayError(f"The task '{task.get_name()}' has died; the log says why.")
            self.stop()
            self.stop()

    async def _reload_certificate(self) -> None:
        while self._certificate is not None:
            await asyncio.sleep(_CERTIFICATE_SECONDS)
            self._certificate.reload()

    async def _unready(self) -> str | None:
        if self._ingress.draining:
            return "draining"
        fault = await self._store.probe()
        return str(fault) if fault else None

    def _status(self) -> dict[str, Any]:
        store, publisher = self._store, self._publisher
        return {
            "version": __version__,
            "uptime_seconds": round(time.time() - self._started_at, 3),
            "draining": self._ingress.draining,
            "kafka": {"connected": publisher.connected, "error": publisher.last_error},
            "registry": {
                "configured": self._settings.schema_registry_url is not None,
                "connected": bool(self._ids and self._ids.connected),
                "errors": dict(self._ids.errors) if self._ids else {},
            },
            "spool": {
                "identity": store.identity,
                "events": store.depth,
                "bytes": store.used_bytes,
                "capacity_bytes": self._settings.spool_max_bytes,
                "oldest_event_age_seconds": round(store.oldest_age, 3),
                "dead_events": len(store.dead),
            },
        }

    def _workspaces_changed(self, tokens: Mapping[str, tuple[bytes, ...]]) -> None:
        for workspace, valid in tokens.items():
            self._metrics.add_workspace(workspace, len(valid))
        self._metrics.add_topics(self._topics.all(tokens))
        if self._ids:
            self._ids.look_again()

    def _data_schema(self, type_name: str) -> str | None:
        schema = self._schemas.get(type_name)
        return schema.uri if schema else None


def _share_one_heap() -> None:
    # By default each thread gets one: what was freed in one is of no use to the others, and 6 MB are never given back.
    with contextlib.suppress(AttributeError):  # Not glibc.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def _opening(host: str, port: int, variables: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RelayError(
            f"Port {port} of {host} cannot be opened: {error.strerror}. "
            f"Set another {variables}_PORT, or {variables}_HOST."
        ) from error
