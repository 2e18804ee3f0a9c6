"""Which schema registry the tests use: a given one, or the local one; and a stub for what the local one lacks."""

import hashlib
import os
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from relay.dev.registry import LocalRegistry, RegistryRuntime
from relay.registry import Registry


@dataclass(frozen=True)
class FoundRegistry:
    """A running registry, and in words which one it is."""

    url: str
    how: str


@contextmanager
def find_registry(local_runtime: Callable[[], RegistryRuntime]) -> Iterator[FoundRegistry]:
    """Yield the registry of RELAY_TEST_REGISTRY, or else a local one; its subjects are shared by all who use it."""
    given = os.environ.get("RELAY_TEST_REGISTRY")
    if given:
        yield FoundRegistry(given, f"{given}, as RELAY_TEST_REGISTRY says")
        return
    with LocalRegistry(runtime=local_runtime()) as registry:
        yield FoundRegistry(registry.url, f"Apicurio at {registry.url} (RELAY_TEST_REGISTRY is not set)")


async def registry_says(registry: Registry, method: str, path: str) -> Any:
    """Ask what the client has no verb for."""
    return await registry._ask("", method, path)


@dataclass
class StubRegistry:
    """Confluent's answers where Apicurio's differ: GUIDs, 40408, reasons, no comparison with all versions at once."""

    url: str = ""
    guids: bool = True
    compares_all_versions: bool = True
    #: The versions of each subject, as ids.
    subjects: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    schemas: list[str] = field(default_factory=list)
    #: What each request carried as Authorization.
    authorizations: list[str | None] = field(default_factory=list)
    #: The versions that a schema was compared with; all of them objected to these texts.
    compared: list[str] = field(default_factory=list)
    incompatible: set[str] = field(default_factory=set)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._note])
        app.add_routes(
            [
                web.get("/subjects", self._list),
                web.post("/subjects/{subject}", self._look_up),
                web.get("/subjects/{subject}/versions", self._versions),
                web.post("/subjects/{subject}/versions", self._register),
                web.get("/config/{subject}", self._setting),
                web.put("/config/{subject}", self._set),
                web.get("/schemas/ids/{id}", self._by_id),
                web.get("/schemas/guids/{guid}", self._by_guid),
                web.post("/compatibility/subjects/{subject}/versions/{version}", self._compare),
            ]
        )
        if self.compares_all_versions:
            app.add_routes([web.post("/compatibility/subjects/{subject}/versions", self._compare)])
        return app

    @web.middleware
    async def _note(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.authorizations.append(request.headers.get("Authorization"))
        response: web.StreamResponse = await handler(request)
        return response

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response([*self.subjects])

    async def _look_up(self, request: web.Request) -> web.Response:
        name = request.match_info["subject"]
        if name not in self.subjects:
            return _error(404, 40401, f"Subject '{name}' not found.")
        text = (await request.json())["schema"]
        id_ = self._id(text)
        if id_ not in self.subjects[name]:
            return _error(404, 40403, "Schema not found")
        return self._described(name, id_)

    async def _register(self, request: web.Request) -> web.Response:
        name, text = request.match_info["subject"], (await request.json())["schema"]
        if text in self.incompatible:
            return _error(409, 40901, "Schema being registered is incompatible with an earlier schema")
        if self._id(text) is None:
            self.schemas.append(text)
        id_ = self._id(text)
        assert id_ is not None
        versions = self.subjects.setdefault(name, [])
        if id_ not in versions:
            versions.append(id_)
        return self._described(name, id_)

    async def _versions(self, request: web.Request) -> web.Response:
        return web.json_response([*range(1, len(self.subjects[request.match_info["subject"]]) + 1)])

    async def _setting(self, request: web.Request) -> web.Response:
        name = request.match_info["subject"]
        if name in self.settings:
            return web.json_response({"compatibilityLevel": self.settings[name]})
        if request.query.get("defaultToGlobal") == "true":
            return web.json_response({"compatibilityLevel": "BACKWARD"})
        return _error(404, 40408, f"Subject '{name}' does not have subject-level compatibility configured")

    async def _set(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.settings[request.match_info["subject"]] = body["compatibility"]
        return web.json_response(body)

    async def _compare(self, request: web.Request) -> web.Response:
        self.compared.append(request.match_info.get("version", "all"))
        if (await request.json())["schema"] not in self.incompatible:
            return web.json_response({"is_compatible": True})
        return web.json_response({"is_compatible": False, "messages": ["PROPERTY_REMOVED at #/properties/x"]})

    async def _by_id(self, request: web.Request) -> web.Response:
        return web.json_response({"schemaType": "JSON", "schema": self.schemas[int(request.match_info["id"]) - 1]})

    async def _by_guid(self, request: web.Request) -> web.Response:
        text = next(text for text in self.schemas if _guid(text) == request.match_info["guid"])
        return web.json_response({"schemaType": "JSON", "schema": text})

    def _id(self, text: str) -> int | None:
        wanted = orjson.loads(text)
        return next((place for place, it in enumerate(self.schemas, 1) if orjson.loads(it) == wanted), None)

    def _described(self, name: str, id_: int) -> web.Response:
        text = self.schemas[id_ - 1]
        known = {"subject": name, "id": id_, "version": self.subjects[name].index(id_) + 1}
        guid = {"guid": _guid(text)} if self.guids else {}
        return web.json_response({**known, **guid, "schemaType": "JSON", "schema": text})


@asynccontextmanager
async def stub_registry(ssl_context: ssl.SSLContext | None = None, **traits: Any) -> AsyncIterator[StubRegistry]:
    """Yield a running stub."""
    stub = StubRegistry(**traits)
    runner = web.AppRunner(stub.application())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl_context).start()
        stub.url = f"http{'s' if ssl_context else ''}://127.0.0.1:{runner.addresses[0][1]}"
        yield stub
    finally:
        await runner.cleanup()


def _guid(text: str) -> str:
    return str(uuid.UUID(bytes=hashlib.md5(text.encode()).digest()))


def _error(status: int, code: int, message: str) -> web.Response:
    return web.json_response({"error_code": code, "message": message}, status=status)
