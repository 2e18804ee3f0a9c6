"""What stands under deploy/, read without any tool, and what must hold of every pod that has a relay in it."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from kubernetes_validate import SchemaNotFoundError, validate

from relay.config import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VALUES = DEPLOY / "rocketchat/values.yaml"
SIDECAR = DEPLOY / "kustomize/components/sidecar/deployment.yaml"
STANDALONE = DEPLOY / "kustomize/standalone"
EXAMPLE = DEPLOY / "kustomize/overlays/example"
COMPOSE = DEPLOY / "compose.yaml"
STRIMZI = DEPLOY / "strimzi"

#: The first with native sidecars switched on, and the newest that there are schemas of.
KUBERNETES = ("1.29", "1.37")
#: Kinds of operators, whose schemas are not Kubernetes' own.
OPERATORS_GROUPS = ("kafka.strimzi.io", "monitoring.coreos.com", "kustomize.config.k8s.io")
#: Seconds from the end of draining to the end of the process: answers under way, then the producer.
CLOSING_SECONDS = 10

#: Rocket.Chat's settings that switch a webhook on: every event that there is.
SWITCHES = {
    f"OVERWRITE_SETTING_Livechat_webhook_on_{event}"
    for event in (
        "start",
        "close",
        "chat_taken",
        "chat_queued",
        "forward",
        "offline_msg",
        "visitor_message",
        "agent_message",
        "capture",
    )
}
URL = "OVERWRITE_SETTING_Livechat_webhookUrl"
TOKEN = "OVERWRITE_SETTING_Livechat_secret_token"

Manifest = dict[str, Any]


def load(path: Path) -> list[Manifest]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> dict[str, Manifest]:
    """Every Kubernetes object under deploy/ by file and name; no patches, no kustomizations."""
    return {
        f"{path.relative_to(DEPLOY)}: {document['kind']} {document['metadata']['name']}": document
        for path in sorted(DEPLOY.rglob("*.yaml"))
        if path != SIDECAR
        for document in load(path)
        if "kind" in document and "metadata" in document
    }


def texts() -> dict[str, str]:
    """Every text under deploy/, and the Dockerfile, by path."""
    paths = [ROOT / "Dockerfile", *(path for path in DEPLOY.rglob("*") if path.is_file())]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def valid(manifest: Manifest) -> bool:
    """
    Whether Kubernetes has a schema for it, by which it is valid.

    Raises: kubernetes_validate.ValidationError
    """
    if manifest["apiVersion"].partition("/")[0] in OPERATORS_GROUPS:
        return False
    try:
        for version in KUBERNETES:
            validate(manifest, version, strict=True)
    except SchemaNotFoundError as error:
        raise AssertionError(error.message) from error
    return True


def as_in_the_chart() -> Manifest:
    """values.yaml in the places in which Rocket.Chat's chart puts it; of the chart only what they must get on with."""
    values = load(VALUES)[0]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "rocketchat"},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": "rocketchat"}},
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": "rocketchat"}},
                "spec": {
                    "securityContext": {"runAsUser": 65533, "fsGroup": 65533},
                    "initContainers": values["extraInitContainers"],
                    "containers": [
                        {
                            "name": "rocketchat",
                            "image": "rocket.chat",
                            "env": values["extraEnv"],
                            "ports": [
                                {"name": "http", "containerPort": 3000},
                                {"name": "metrics", "containerPort": 9100},
                                {"name": "ms-metrics", "containerPort": 9458},
                            ],
                            "volumeMounts": [
                                {"name": "rocket-data", "mountPath": "/app/uploads"},
                                {"name": "tmp", "mountPath": "/tmp"},
                            ],
                        }
                    ],
                    "volumes": [
                        {"name": "tmp", "emptyDir": {}},
                        {"name": "rocket-data", "emptyDir": {}},
                        *values["extraVolumes"],
                    ],
                },
            },
        },
    }


def named(items: list[Manifest], name: str) -> Manifest:
    """The one of *items* that has this name."""
    [found] = [item for item in items if item["name"] == name]
    return found


def environment(container: Manifest) -> dict[str, str]:
    """The plain variables of a container."""
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}


def relay_of(pod: Manifest) -> Manifest:
    """The relay's container, whether it is a sidecar or alone."""
    return named([*pod.get("initContainers", []), *pod["containers"]], "relay")


class Pod:
    """A pod with a relay in it, and what must hold of it."""

    def __init__(self, spec: Manifest, claims: list[Manifest], folder: Path) -> None:
        """*claims* are the volumeClaimTemplates; in *folder* the files are made that the settings name."""
        self.spec = spec
        self.relay = relay_of(spec)
        self.volumes: dict[str, Manifest] = {volume["name"]: volume for volume in spec.get("volumes", [])}
        self.volumes |= {claim["metadata"]["name"]: claim["spec"] for claim in claims}
        self.environ = environment(self.relay)
        self.settings = Settings.read(self._with_files(folder))

    def _with_files(self, folder: Path) -> Mapping[str, str]:
        environ = dict(self.environ)
        for path in self.files():
            here = folder / path.removeprefix("/")
            here.parent.mkdir(parents=True, exist_ok=True)
            here.write_text("content")
        for name, value in environ.items():
            if value.startswith("/etc/"):
                environ[name] = str(folder / value.removeprefix("/"))
        return environ

    def mounts(self, container: Manifest) -> dict[str, str]:
        """The volumes of a container by the path at which they are mounted."""
        return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}

    def files(self) -> dict[str, tuple[str, str]]:
        """The files that Secrets put into the relay's container: path, and the Secret's name and key."""
        return dict(self._files())

    def _files(self) -> Iterator[tuple[str, tuple[str, str]]]:
        for path, name in self.mounts(self.relay).items():
            for source in self.volumes[name].get("projected", {}).get("sources", []):
                for item in source["secret"]["items"]:
                    yield str(PurePosixPath(path, item["path"])), (source["secret"]["name"], item["key"])

    def port(self, name: str) -> int:
        """The number of one of the relay's named ports."""
        number: int = named(self.relay["ports"], name)["containerPort"]
        return number
