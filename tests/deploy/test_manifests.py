"""What stands under deploy/ is valid, agrees with itself, and names nothing that the relay does not have."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from deploy.manifests import (
    CLOSING_SECONDS,
    DEPLOY,
    EXAMPLE,
    OPERATORS_GROUPS,
    ROOT,
    SIDECAR,
    STANDALONE,
    STRIMZI,
    SWITCHES,
    TOKEN,
    URL,
    VALUES,
    Manifest,
    Pod,
    as_in_the_chart,
    environment,
    load,
    manifests,
    named,
    relay_of,
    texts,
    valid,
)
from docs import metrics_table
from prometheus_client import CollectorRegistry

from relay import __version__, admin, ingress
from relay.cli import main
from relay.config import Settings, settings_table
from relay.connection import Connection
from relay.kafka import Producer, TopicPlan
from relay.record import RECORD_OVERHEAD

IMAGE = "rocketchat-kafka-relay"

DEFAULTS = Settings.read({"RELAY_TOKEN": "t"})


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


def _admin_paths() -> set[str]:
    async def unready() -> str | None:
        return None

    app = admin.application(registry=CollectorRegistry(), unready=unready, status=dict)
    return {resource.canonical for resource in app.router.resources() if isinstance(resource, web.PlainResource)}


def _with_sidecar() -> Manifest:
    """The example's Deployment with the component's patch, laid over it as kustomize does."""
    [deployment] = load(EXAMPLE / "rocketchat.yaml")
    [patch] = load(SIDECAR)
    pod, added = deployment["spec"]["template"]["spec"], patch["spec"]["template"]["spec"]
    container, addition = named(pod["containers"], "rocketchat"), named(added["containers"], "rocketchat")
    container["env"] = [*addition["env"], *container["env"]]
    return {**deployment, "spec": {**deployment["spec"], "template": {"spec": {**added, **pod}}}}


def _stateful_set() -> Manifest:
    [found] = load(STANDALONE / "statefulset.yaml")
    return found


@pytest.fixture(params=[as_in_the_chart, _with_sidecar])
def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> Pod:
    """Yield a pod in which the relay is Rocket.Chat's sidecar."""
    return Pod(request.param()["spec"]["template"]["spec"], [], tmp_path)


@pytest.fixture(params=[as_in_the_chart, _with_sidecar, _stateful_set])
def pod(request: pytest.FixtureRequest, tmp_path: Path) -> Pod:
    """Yield each kind of pod that has a relay in it."""
    spec = request.param()["spec"]
    return Pod(spec["template"]["spec"], spec.get("volumeClaimTemplates", []), tmp_path)


# --- Names. ---


@pytest.mark.parametrize("path", sorted(texts()))
def test_every_setting_named_exists(path: str) -> None:
    known = set(re.findall(r"RELAY_\w+", settings_table())) | {"RELAY_TEST_CHART"}
    assert set(re.findall(r"RELAY_\w*[A-Z]", texts()[path])) <= known


@pytest.mark.parametrize("path", sorted(texts()))
def test_every_metric_named_exists(path: str) -> None:
    declared = set(re.findall(r"`(relay_\w+)`", metrics_table()))
    kinds = {f"{name}_{part}" for name in declared if name.endswith("_seconds") for part in ("bucket", "sum", "count")}
    headers = {"relay_schema_error", "relay_sequence", "relay_error_reason", "relay_error_detail"}
    assert set(re.findall(r"\brelay_[a-z_]+", texts()[path])) <= declared | kinds | headers


@pytest.mark.parametrize("path", sorted(texts()))
def test_every_address_named_is_one_of_the_relays(path: str) -> None:
    known = {DEFAULTS.http_port: {ingress.PATH}, DEFAULTS.admin_port: _admin_paths()}
    for port, where in re.findall(r":(808\d)(?:/proxy)?(/[a-z]+)?\b", texts()[path]):
        assert int(port) in known
        assert not where or where in known[int(port)], f":{port}{where}"


@pytest.mark.parametrize("path", sorted(texts()))
def test_every_command_named_exists(path: str) -> None:
    commands = re.findall(
        r"(?:bin/|exec relay |--container relay \S+ -- |`|^ *\$ )relay ([a-z]+)", texts()[path], re.MULTILINE
    )
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0, command


@pytest.mark.parametrize("path", sorted(texts()))
def test_the_image_is_of_this_version(path: str) -> None:
    tags = re.findall(rf"{IMAGE}:([\w.]+)", texts()[path]) + re.findall(r"newTag: (\S+)", texts()[path])
    assert set(tags) <= {__version__}


# --- Kubernetes. ---


@pytest.mark.parametrize("name", sorted(manifests()))
def test_manifest_is_valid(name: str) -> None:
    manifest = manifests()[name]
    group = manifest["apiVersion"].partition("/")[0]
    assert valid(manifest) == (group not in OPERATORS_GROUPS)


@pytest.mark.parametrize("manifest", [as_in_the_chart(), _with_sidecar()], ids=["chart", "component"])
def test_rocketchat_with_the_sidecar_is_valid(manifest: Manifest) -> None:
    labels = manifest["spec"]["selector"]["matchLabels"]
    manifest["spec"]["template"]["metadata"] = {"labels": labels}
    assert valid(manifest)


def test_sidecar_is_the_same_with_helm_and_with_kustomize() -> None:
    [values], [patch] = load(VALUES), load(SIDECAR)
    pod = patch["spec"]["template"]["spec"]
    assert pod["initContainers"] == values["extraInitContainers"]
    assert pod["volumes"] == values["extraVolumes"]
    assert named(pod["containers"], "rocketchat")["env"] == values["extraEnv"]


def test_standalone_differs_from_the_sidecar_where_it_must() -> None:
    sidecar, alone = load(VALUES)[0]["extraInitContainers"][0], relay_of(_stateful_set()["spec"]["template"]["spec"])
    differing = {key for key in {*sidecar, *alone} if sidecar.get(key) != alone.get(key)}
    assert differing == {"restartPolicy", "env", "resources", "volumeMounts"}
    assert dict(set(environment(alone).items()) - set(environment(sidecar).items())) == {"RELAY_HTTP_HOST": "0.0.0.0"}
    assert set(environment(sidecar)) < set(environment(alone))


def test_sidecar_starts_before_rocketchat_and_stays(sidecar: Pod) -> None:
    assert sidecar.spec["initContainers"][0] is sidecar.relay
    assert sidecar.relay["restartPolicy"] == "Always"
    assert "startupProbe" in sidecar.relay


def test_rocketchat_sends_to_the_sidecar(sidecar: Pod) -> None:
    rocketchat = named(sidecar.spec["containers"], "rocketchat")
    url = urlsplit(environment(rocketchat)[URL])
    assert (url.scheme, url.hostname, url.path) == ("http", sidecar.settings.http_host, ingress.PATH)
    assert url.port == sidecar.settings.http_port == sidecar.port("relay-webhook")
    switches = {name: value for name, value in environment(rocketchat).items() if name in SWITCHES}
    assert switches == dict.fromkeys(SWITCHES, "true")


def test_both_have_the_token_from_one_secret(sidecar: Pod) -> None:
    rocketchat = named(sidecar.spec["containers"], "rocketchat")
    sent = named(rocketchat["env"], TOKEN)["valueFrom"]["secretKeyRef"]
    assert sent == {"name": "rocketchat-relay", "key": "token"}
    assert sidecar.files()[sidecar.environ["RELAY_TOKEN_FILE"]] == ("rocketchat-relay", "accepted")


def test_no_port_and_no_name_is_taken_twice(sidecar: Pod) -> None:
    containers = [*sidecar.spec["initContainers"], *sidecar.spec["containers"]]
    ports = [port for container in containers for port in container["ports"]]
    for key in ("name", "containerPort"):
        assert len({port[key] for port in ports}) == len(ports)
    names = [volume["name"] for volume in sidecar.spec["volumes"]]
    assert len(set(names)) == len(names)


def test_ports_are_those_of_the_settings(pod: Pod) -> None:
    assert pod.port("relay-webhook") == pod.settings.http_port
    assert pod.port("relay-admin") == pod.settings.admin_port
    assert pod.settings.admin_host == "0.0.0.0", "the kubelet probes the pod's address"


@pytest.mark.parametrize(
    ("probe", "path"), [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
)
def test_probe_asks_the_admin_port(pod: Pod, probe: str, path: str) -> None:
    assert pod.relay[probe]["httpGet"] == {"path": path, "port": "relay-admin"}
    assert path in _admin_paths()


def test_every_volume_is_there_and_every_file_in_it(pod: Pod) -> None:
    for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
        assert set(pod.mounts(container).values()) <= set(pod.volumes) if "volumeMounts" in container else True
    for name, value in pod.environ.items():
        if name.endswith("FILE"):
            assert value in pod.files(), name


def test_spool_has_a_volume_with_room_to_spare(pod: Pod) -> None:
    volume = pod.volumes[pod.mounts(pod.relay)[str(pod.settings.spool_path.parent)]]
    size = volume["emptyDir"]["sizeLimit"] if "emptyDir" in volume else volume["resources"]["requests"]["storage"]
    # The write-ahead log beside the file.
    assert _bytes(size) >= 1.5 * pod.settings.spool_max_bytes


def test_grace_period_is_longer_than_the_drain(pod: Pod) -> None:
    # Of the chart's 30 s, which it lets nobody change, Rocket.Chat's own stop is a second or two.
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    assert grace >= pod.settings.drain_seconds + CLOSING_SECONDS


def test_container_has_no_rights(pod: Pod) -> None:
    assert pod.relay["securityContext"] == {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_standalone_selects_its_own_pods() -> None:
    spec = _stateful_set()["spec"]
    labels, ports = spec["template"]["metadata"]["labels"], relay_of(spec["template"]["spec"])["ports"]
    [service], [budget] = load(STANDALONE / "service.yaml"), load(STANDALONE / "poddisruptionbudget.yaml")
    [policy] = load(STANDALONE / "networkpolicy.yaml")
    assert spec["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert spec["serviceName"] == service["metadata"]["name"]
    names = {port["name"] for port in ports}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    let_in = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    assert set(let_in) == names


def test_standalone_may_reach_kafka(tmp_path: Path) -> None:
    spec = _stateful_set()["spec"]
    pod = Pod(spec["template"]["spec"], spec["volumeClaimTemplates"], tmp_path)
    [policy] = load(STANDALONE / "networkpolicy.yaml")
    let_out = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert let_out == {53, int(pod.settings.kafka_bootstrap_servers.rpartition(":")[2])}


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomization_names_what_is_there(path: Path) -> None:
    [kustomization] = load(path)
    patches = [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
    named_ = [*kustomization.get("resources", []), *kustomization.get("components", []), *patches]
    assert named_ or "configMapGenerator" in kustomization
    for name in named_:
        assert (path.parent / name).exists(), name


def test_component_finds_the_examples_deployment() -> None:
    [component] = load(SIDECAR.parent / "kustomization.yaml")
    key, _, value = component["patches"][0]["target"]["labelSelector"].partition("=")
    [deployment] = load(EXAMPLE / "rocketchat.yaml")
    assert deployment["metadata"]["labels"][key] == value


# --- systemd. ---


@pytest.fixture
def unit() -> configparser.ConfigParser:
    """Return the unit; of a key that comes more than once the last."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "systemd/relay.service")
    return parser


def test_unit_waits_for_the_drain(unit: configparser.ConfigParser) -> None:
    assert int(unit["Service"]["TimeoutStopSec"]) >= DEFAULTS.drain_seconds + CLOSING_SECONDS


def test_unit_keeps_the_spool_in_its_state_directory(unit: configparser.ConfigParser) -> None:
    assert (
        f"RELAY_SPOOL_PATH=/var/lib/{unit['Service']['StateDirectory']}/"
        in (DEPLOY / "systemd/relay.service").read_text()
    )


def test_unit_does_not_start_over_with_wrong_settings(
    unit: configparser.ConfigParser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_NO_SUCH_SETTING", "1")
    code = main(["serve"])
    assert unit["Service"]["RestartPreventExitStatus"] == str(code)
    assert "RELAY_NO_SUCH_SETTING" in capsys.readouterr().err


def test_commands_are_run_with_the_units_settings(tmp_path: Path) -> None:
    [code] = re.findall(r"```sh\n(as_relay\(\) .*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "token").write_text("t")
    (tmp_path / "relay.env").write_text("RELAY_KAFKA_BOOTSTRAP_SERVERS=kafka.example.com:9092\n")
    for here, there in {
        "/etc/relay": str(tmp_path),
        "/opt/relay/bin/relay": f"{sys.executable} -m relay",
        "runuser -u relay -- ": "",  # There is no such user on this machine.
        "as_relay check": "as_relay config",
    }.items():
        assert here in code
        code = code.replace(here, there)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    shown = subprocess.run(["sh", "-c", code], env=inherited, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "RELAY_KAFKA_BOOTSTRAP_SERVERS=kafka.example.com:9092" in shown.stdout.splitlines()
    of_the_unit = re.findall(r"^Environment=(\w+)=(\S+)$", (DEPLOY / "systemd/relay.service").read_text(), re.MULTILINE)
    assert len(of_the_unit) == 2
    for name, value in of_the_unit:
        setting = name.removesuffix("_FILE")
        assert f"{setting}={value.replace('/etc/relay', str(tmp_path))}" in shown.stdout.splitlines()


# --- Strimzi. ---


def _topics() -> dict[str, Manifest]:
    return {topic["metadata"]["name"]: topic["spec"] for topic in load(STRIMZI / "topics.yaml")}


def test_topics_are_those_of_the_settings() -> None:
    assert set(_topics()) == {DEFAULTS.topic, DEFAULTS.dead_letter_topic, DEFAULTS.watermark_topic}


@pytest.mark.parametrize("name", [DEFAULTS.topic, DEFAULTS.dead_letter_topic])
def test_topic_takes_the_largest_body(name: str) -> None:
    config = _topics()[name]["config"]
    assert config["max.message.bytes"] >= DEFAULTS.max_body_bytes + RECORD_OVERHEAD
    assert config["cleanup.policy"] == "delete"


def test_watermarks_are_kept_for_ever() -> None:
    assert _topics()[DEFAULTS.watermark_topic]["config"]["cleanup.policy"] == "compact"


@pytest.mark.parametrize("name", sorted(_topics()))
def test_topic_outlives_a_broker(name: str) -> None:
    spec = _topics()[name]
    assert 2 <= spec["config"]["min.insync.replicas"] < spec["replicas"]


def test_user_may_do_what_the_relay_does(tmp_path: Path) -> None:
    [user] = load(STRIMZI / "user.yaml")
    rights = {
        (acl["resource"]["type"], acl["resource"]["name"], operation)
        for acl in user["spec"]["authorization"]["acls"]
        for operation in acl["operations"]
    }
    topics = {("topic", name, operation) for name in _topics() for operation in ("Write", "DescribeConfigs")}
    read = ("topic", DEFAULTS.watermark_topic, "Read")
    assert rights == {*topics, read, ("transactionalId", "relay-", "Write")}
    plan = TopicPlan([DEFAULTS.topic], DEFAULTS.watermark_topic, create=False, max_message_bytes=1)
    producer = Producer(Connection("", ""), plan, "identity", None)
    assert producer._delivery_options()["transactional_id"].startswith("relay-")
    pod = Pod(as_in_the_chart()["spec"]["template"]["spec"], [], tmp_path)
    assert pod.settings.kafka_sasl_mechanism == user["spec"]["authentication"]["type"].upper()
    assert pod.settings.kafka_sasl_username == user["metadata"]["name"]
    assert pod.files()[pod.environ["RELAY_KAFKA_SASL_PASSWORD_FILE"]] == (user["metadata"]["name"], "password")


def test_pods_trust_the_cluster_whose_topics_they_are(tmp_path: Path) -> None:
    [cluster] = {document["metadata"]["labels"]["strimzi.io/cluster"] for document in load(STRIMZI / "topics.yaml")}
    pod = Pod(as_in_the_chart()["spec"]["template"]["spec"], [], tmp_path)
    assert pod.settings.kafka_bootstrap_servers == f"{cluster}-kafka-bootstrap:9093"
    assert pod.files()[pod.environ["RELAY_KAFKA_SSL_CAFILE"]] == (f"{cluster}-cluster-ca-cert", "ca.crt")


# --- The image. ---


DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_image_runs_as_nobody_in_particular() -> None:
    [user] = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_image_starts_the_relay_without_a_shell() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert 'ENTRYPOINT ["/app/bin/relay"]\nCMD ["serve"]' in final
    assert all(step.startswith("[") for step in re.findall(r"^RUN (.*)$", final, re.MULTILINE))


def test_image_has_the_ports_of_the_settings() -> None:
    [ports] = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)
    assert ports.split() == [str(DEFAULTS.http_port), str(DEFAULTS.admin_port)]


def test_build_gets_what_it_copies() -> None:
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        name
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for name in sources.split()
    }
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


def test_build_tools_are_locked() -> None:
    [tools] = re.findall(r"/\^\(([\w|-]+)\)==/", DOCKERFILE)
    locked = re.findall(r"^([\w-]+)==", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    assert "hatchling" in tools.split("|")
    assert set(tools.split("|")) <= set(locked)
