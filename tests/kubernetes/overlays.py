"""What is under deploy/, made their own as a user would: a kustomization with another image, Kafka and patches."""

import os
from pathlib import Path
from typing import Any

import yaml
from deploy.manifests import Manifest
from kafka_for_pods import KafkaForPods
from kubernetes.cluster import Namespace

from relay import __version__


def image() -> str:
    """The relay's image: the given one, or that of `make image`."""
    return os.environ.get("RELAY_TEST_IMAGE") or f"rocketchat-kafka-relay:{__version__}"


def relay_at(kafka: KafkaForPods) -> Manifest:
    """A patch of the relay's container: where Kafka is."""
    return {"name": "relay", "env": [{"name": "RELAY_KAFKA_BOOTSTRAP_SERVERS", "value": kafka.address}]}


def patch_of(kind: str, name: str, replicas: int, spec: Manifest) -> Manifest:
    """A kustomization's patch: the number of pods, and what is other in their spec."""
    patch = {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "template": {"spec": spec}},
    }
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(patch)}


def write_kustomization(folder: Path, namespace: Namespace, base: Path, **rest: Any) -> None:
    """Writes into *folder* what a user would: *base* in this namespace, with the image in its place."""
    name, _, tag = image().rpartition(":")
    used = ["rocketchat-kafka-relay", "registry.rocket.chat/rocketchat/rocket.chat"]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace.name,
        "resources": [os.path.relpath(base, folder.resolve())],
        "images": [{"name": it, "newName": name, "newTag": tag} for it in used],
        **rest,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
