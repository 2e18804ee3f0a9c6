"""The API server takes every manifest under deploy/ as it stands: tried on the server, unknown fields refused."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.manifests import DEPLOY, OPERATORS_GROUPS, Manifest, as_in_the_chart, load, manifests
from deploy.tools import CHART, chart_rendered, installed
from kubernetes.cluster import Namespace
from kubernetes.overlays import write_kustomization

#: A folder with the definitions of Strimzi's and the Prometheus operator's kinds, if it was given.
CRDS = os.environ.get("RELAY_TEST_CRDS", "")
FOLDERS = [
    path.parent
    for path in sorted(DEPLOY.rglob("kustomization.yaml"))
    if load(path)[0]["kind"] != "Component"  # The example applies it.
]


@pytest.fixture(scope="module")
def operators(kubectl: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Give the cluster the kinds of the operators that it does not have: the real ones if they are given."""
    cluster = Namespace(kubectl, "default")
    given = {name(it): it for path in sorted(Path(CRDS).glob("*.yaml")) for it in load(path)} if CRDS else {}
    wanted = {
        name(it): it for it in map(anything_goes, manifests().values()) if it["spec"]["group"] in OPERATORS_GROUPS
    }
    there = {name(it) for it in cluster.get("crd")["items"]}
    added = [given.get(it, wanted[it]) for it in wanted if it not in there]
    origins = [
        "the cluster's own" if it in there else "given" if it in given else "one that takes anything" for it in wanted
    ]
    report(f"Custom resources: {', '.join(f'{it} ({how})' for it, how in zip(wanted, origins, strict=True))}")
    if added:
        cluster.apply(*added, server_side=True)
        cluster.run("wait", "--for=condition=Established", "--timeout=60s", *(f"crd/{name(it)}" for it in added))
    yield
    if added:
        cluster.run("delete", *(f"crd/{name(it)}" for it in added))


def name(manifest: Manifest) -> str:
    found: str = manifest["metadata"]["name"]
    return found


def anything_goes(manifest: Manifest) -> Manifest:
    """The definition of a kind of which the API server knows no more than its name, made from an object of it."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    kind: str = manifest["kind"]
    schema: dict[str, Any] = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.lower()}s.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": f"{kind.lower()}s"},
            "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
        },
    }


def accepted(namespace: Namespace, *manifests: Manifest) -> set[str]:
    """Kind and name of each that the API server would take."""
    dry_run = ("apply", "--dry-run=server", "--validate=strict", "--filename", "-", "--output", "yaml")
    [answer] = yaml.safe_load_all(namespace.run(*dry_run, given=yaml.safe_dump_all(manifests)))
    return {f"{it['kind']} {name(it)}" for it in answer.get("items", [answer])}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_kustomization_is_accepted(namespace: Namespace, operators: None, folder: Path, tmp_path: Path) -> None:
    write_kustomization(tmp_path, namespace, folder)
    rendered = [it for it in yaml.safe_load_all(namespace.run("kustomize", tmp_path)) if it]
    assert accepted(namespace, *rendered) == {f"{it['kind']} {name(it)}" for it in rendered}


def test_no_manifest_is_left_out() -> None:
    listed = {
        path
        for folder in FOLDERS
        for path in (folder / it for it in load(folder / "kustomization.yaml")[0].get("resources", []))
    }
    files = {DEPLOY / it.partition(": ")[0] for it in manifests()}
    assert files <= {path.resolve() for path in listed}


def test_values_of_the_chart_are_accepted(namespace: Namespace, tmp_path: Path) -> None:
    deployment = chart_rendered(installed(), Path(CHART), tmp_path) if CHART else as_in_the_chart()
    assert accepted(namespace, deployment) == {f"Deployment {name(deployment)}"}
