"""A real Kubernetes through kubectl: one namespace of it, and the pods in there."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from deploy.manifests import Manifest, named
from relay_process import wait_until

_STATUS = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8081/status').read().decode())"
#: A process cannot SIGKILL the first one of its own container: the pod must share its processes among its containers.
_KILL_RELAY = """
import os, pathlib, signal
commands = pathlib.Path("/proc").glob("[0-9]*/cmdline")
[pid] = [int(path.parent.name) for path in commands if b"/relay\\0serve" in path.read_bytes()]
os.kill(pid, signal.SIGKILL)
"""


class Namespace:
    """A namespace of the cluster that KUBECONFIG names; *kubectl* is the program."""

    def __init__(self, kubectl: Path, name: str) -> None:
        self.name = name
        self._kubectl = [str(kubectl), "--namespace", name]

    def command(self, *arguments: object) -> list[str]:
        """The command line of `kubectl` in this namespace."""
        return [*self._kubectl, *map(str, arguments)]

    def run(self, *arguments: object, given: str | None = None, seconds: float = 300) -> str:
        """What `kubectl` prints, *given* its standard input; fails with what it complains of."""
        done = self.tried(*arguments, given=given, seconds=seconds)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tried(
        self, *arguments: object, given: str | None = None, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs `kubectl`, whatever comes of it."""
        command = self.command(*arguments)
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)

    def apply(self, *manifests: Manifest, server_side: bool = False) -> None:
        """Applies objects."""
        how = ["--server-side"] if server_side else []
        self.run("apply", *how, "--filename", "-", given=yaml.safe_dump_all(manifests))

    def get(self, *what: object) -> Manifest:
        """An object, or a list of them."""
        found: Manifest = json.loads(self.run("get", *what, "--output", "json"))
        return found

    def pods(self, app: str) -> list[Manifest]:
        """The pods of an `app.kubernetes.io/name` that are not being deleted."""
        found = self.get("pods", "--selector", f"app.kubernetes.io/name={app}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod(self, app: str) -> Manifest:
        """The only such pod."""
        [pod] = self.pods(app)
        return pod

    def wait_for_rollout(self, what: str, *, seconds: float = 300) -> None:
        """Returns when all pods of a Deployment or a StatefulSet are new and ready."""
        self.run("rollout", "status", what, f"--timeout={seconds:g}s", seconds=seconds + 30)

    def relay_status(self, pod: str) -> dict[str, Any]:
        """What the relay in a pod says at `/status`."""
        status: dict[str, Any] = json.loads(
            self.run("exec", pod, "--container", "relay", "--", "python3", "-c", _STATUS)
        )
        return status

    def wait_for_relay(self, pod: str, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """What the relay in a pod says at `/status` as soon as that fulfils a *condition*."""
        status: dict[str, Any] = {}

        def fulfilled() -> bool:
            status.update(self.relay_status(pod))
            return condition(status)

        wait_until(fulfilled, what, seconds=120, pause=0.5)
        return status

    def kill_relay(self, pod: str) -> None:
        """Sends SIGKILL to the relay in a pod whose containers share their processes."""
        self.run("exec", pod, "--container", "relay", "--", "python3", "-c", _KILL_RELAY)

    @contextmanager
    def forwarded(self, what: str, port: str) -> Iterator[int]:
        """The port on this machine's loopback that leads to a *port* of a pod or a Service, for the with-block."""
        with subprocess.Popen(
            self.command("port-forward", what, f":{port}"), stdout=subprocess.PIPE, text=True
        ) as forwarding:
            try:
                assert forwarding.stdout
                line = forwarding.stdout.readline()
                found = re.search(r"127\.0\.0\.1:(\d+)", line)
                assert found, line
                yield int(found[1])
            finally:
                forwarding.terminate()


def container(pod: Manifest, name: str) -> Manifest:
    """The status of a container, a sidecar's as well."""
    status = pod["status"]
    return named([*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])], name)


def ready(pod: Manifest) -> tuple[bool, str]:
    """Whether a pod is ready, and since when that is so."""
    [condition] = [it for it in pod["status"]["conditions"] if it["type"] == "Ready"]
    return condition["status"] == "True", condition["lastTransitionTime"]


def when(timestamp: str) -> float:
    """Seconds since the epoch, without their fraction: Kubernetes tells no more."""
    return datetime.fromisoformat(timestamp).timestamp()


def own_address(namespace: Namespace) -> str:
    """The address of this machine at which pods reach it: that on the way to the nodes, unless it is given."""
    if given := os.environ.get("RELAY_TEST_ADDRESS"):
        return given
    nodes = namespace.get("nodes")["items"]
    addresses = [it["address"] for it in nodes[0]["status"]["addresses"] if it["type"] == "InternalIP"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((addresses[0], 9))
        return str(asking.getsockname()[0])
