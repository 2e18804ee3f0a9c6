"""The local schema registry that `relay dev --registry` and the tests stand on."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relay.dev.registry import LocalRegistry, RegistryRuntime, RegistryUnusableError
from relay.errors import RegistryUnreachable
from relay.registry import Registry
from relay.schemas import Schemas

SCHEMA = next(iter(Schemas.load()))


async def register(registry: LocalRegistry, *, patience: float = 10) -> int:
    async with Registry(registry.url, timeout=patience) as client:
        return (await client.register("s", SCHEMA.text)).id


async def test_a_killed_registry_comes_back_with_its_port_its_ids_and_settings(own_registry: LocalRegistry) -> None:
    url = own_registry.url
    id_ = await register(own_registry)

    own_registry.kill()

    assert not own_registry.running
    with pytest.raises(RegistryUnreachable):
        await register(own_registry)
    own_registry.start()
    assert own_registry.url == url
    async with Registry(url) as client:
        assert (await client.look_up("s", SCHEMA.text)).id == id_
        assert await client.subjects() == ["s"]
        assert await client._compatibility("s") == "FORWARD_TRANSITIVE"


async def test_a_restarted_registry_keeps_its_ids(own_registry: LocalRegistry) -> None:
    id_ = await register(own_registry)

    own_registry.restart()

    assert await register(own_registry) == id_


async def test_a_frozen_registry_takes_connections_and_answers_only_when_thawed(own_registry: LocalRegistry) -> None:
    own_registry.freeze()

    socket.create_connection(("127.0.0.1", own_registry.port), timeout=5).close()
    with pytest.raises(RegistryUnreachable, match="no answer within"):
        await register(own_registry, patience=0.2)
    own_registry.thaw()
    own_registry.wait_until_ready()
    assert await register(own_registry)


def test_nobody_else_gets_the_port_of_a_stopped_registry(own_registry: LocalRegistry) -> None:
    own_registry.stop()

    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", own_registry.port))
    own_registry.start()


async def test_subjects_in_a_given_directory_outlive_the_registry(
    registry_runtime: RegistryRuntime, tmp_path: Path
) -> None:
    with LocalRegistry(data_dir=tmp_path / "kept", runtime=registry_runtime) as first:
        id_ = await register(first)

    with LocalRegistry(data_dir=tmp_path / "kept", runtime=registry_runtime) as second:
        assert second.url != first.url
        async with Registry(second.url) as client:
            assert (await client.look_up("s", SCHEMA.text)).id == id_


def test_a_closed_registry_leaves_nothing_behind(registry_runtime: RegistryRuntime) -> None:
    with LocalRegistry(runtime=registry_runtime) as registry:
        home, pid = registry._home, registry.pid
        assert home.exists()

    assert not home.exists()
    assert not Path(f"/proc/{pid}").exists()
    with socket.socket() as other:
        other.bind(("127.0.0.1", registry.port))


def test_properties_are_read_at_each_start(own_registry: LocalRegistry) -> None:
    own_registry.properties["quarkus.http.port"] = "no number"

    own_registry.stop()

    with pytest.raises(RegistryUnusableError, match=r"(?s)The registry ended.*quarkus\.http\.port"):
        own_registry.start()
    own_registry.properties.clear()
    own_registry.start()


def test_no_registry_outlives_a_killed_owner(registry_runtime: RegistryRuntime, tmp_path: Path) -> None:
    owner = f"""
import pathlib
from relay.dev.registry import LocalRegistry
registry = LocalRegistry(data_dir=pathlib.Path({str(tmp_path)!r}))
registry.start()
print(registry.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", owner], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the registry is still there"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
