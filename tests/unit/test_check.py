from pathlib import Path

import pytest

from relay.check_kafka import _config_faults, _topic_faults
from relay.cli import main
from relay.cluster import Topic
from relay.config import Settings

EVENTS, WATERMARKS = "rocketchat.omnichannel", "rocketchat.omnichannel.watermarks"
SETTINGS = Settings.read({"RELAY_TOKEN": "t", "RELAY_KAFKA_BOOTSTRAP_SERVERS": "kafka:9092"})
SOUND = {"min.insync.replicas": "2", "max.message.bytes": "16781312", "cleanup.policy": "delete"}


def configs_command(topic: str, change: str) -> str:
    options = f"--alter --entity-type topics --entity-name {topic} --add-config {change}"
    return f"run `kafka-configs.sh --bootstrap-server kafka:9092 {options}`"


# --- Tokens that cannot be read. ---


@pytest.fixture(params=["empty", "blank", "not text", "gone", "a directory"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a file of tokens that holds none."""
    path = tmp_path / "tokens" / "east"
    path.parent.mkdir()
    match request.param:
        case "gone":  # A mounted secret's link to what was taken away.
            path.symlink_to(tmp_path / "nowhere")
        case "a directory":
            path.mkdir()
        case kind:
            path.write_bytes({"empty": b"", "blank": b" \n\n", "not text": b"\xff\xfe"}[kind])
    return path


def test_a_workspace_s_tokens_that_cannot_be_read_are_a_finding(
    unusable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_WORKSPACES_DIR", str(unusable.parent))
    assert main(["check"]) == 1
    (failure,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failure.startswith("FAIL tokens: ")
    assert str(unusable) in failure


@pytest.mark.parametrize("action", ["list", "check", "register"])
def test_the_schemas_of_workspaces_whose_tokens_cannot_be_read_are_not_told(
    action: str, unusable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_WORKSPACES_DIR", str(unusable.parent))
    monkeypatch.setenv("RELAY_SCHEMA_REGISTRY_URL", "http://127.0.0.1:1")
    assert main(["schemas", action]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert str(unusable) in said.err


@pytest.mark.parametrize("arguments", [("check",), ("schemas", "list")])
def test_a_file_of_tokens_that_cannot_be_read_is_named_with_its_setting(
    arguments: tuple[str, ...], unusable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_TOKEN_FILE", str(unusable))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("relay: RELAY_TOKEN: by RELAY_TOKEN_FILE: ")
    assert str(unusable) in said.err


# --- Topics: what one broker alone cannot show. ---


@pytest.mark.parametrize(
    ("topic", "config", "faults"),
    [
        (Topic(6, 3, ()), SOUND, []),
        (Topic(6, 1, ()), SOUND | {"min.insync.replicas": "1"}, []),
        (
            Topic(6, 3, ()),
            SOUND | {"min.insync.replicas": "1"},
            [f"confirms on one broker alone: {configs_command(EVENTS, 'min.insync.replicas=2')}"],
        ),
        (
            Topic(6, 3, ()),
            SOUND | {"min.insync.replicas": "4"},
            [f"can never be: {configs_command(EVENTS, 'min.insync.replicas=2')}, or add replicas"],
        ),
        (
            Topic(6, 3, ()),
            SOUND | {"max.message.bytes": "16781311"},
            [f"bodies may have: {configs_command(EVENTS, 'max.message.bytes=16781312')}, or lower"],
        ),
        (
            Topic(6, 3, ()),
            SOUND | {"cleanup.policy": "compact,delete"},
            [f"one record a chat: {configs_command(EVENTS, 'cleanup.policy=delete')}"],
        ),
        (Topic(6, 3, ()), None, ["run `kafka-acls.sh --bootstrap-server kafka:9092 --add"]),
    ],
)
def test_settings_of_a_topic_that_do_not_fit_are_told_with_the_command_that_mends_them(
    topic: Topic, config: dict[str, str] | None, faults: list[str]
) -> None:
    found = list(_config_faults(SETTINGS, EVENTS, topic, config))
    assert len(found) == len(faults)
    for fault, text in zip(faults, found, strict=True):
        assert fault in text


@pytest.mark.parametrize(("policy", "sound"), [("compact", True), ("delete", False), ("compact,delete", False)])
def test_watermarks_must_be_compacted_and_never_expire(policy: str, sound: bool) -> None:
    config = {"cleanup.policy": policy, "min.insync.replicas": "2", "max.message.bytes": "1000"}
    found = list(_config_faults(SETTINGS, WATERMARKS, Topic(3, 3, ()), config))
    assert bool(found) != sound
    assert all(configs_command(WATERMARKS, "cleanup.policy=compact") in text for text in found)


def test_a_topic_on_one_of_several_brokers_or_without_a_leader_is_told() -> None:
    assert not list(_topic_faults(SETTINGS, EVENTS, Topic(6, 1, ()), 1))
    assert not list(_topic_faults(SETTINGS, EVENTS, Topic(6, 2, ()), 3))
    leaderless, alone = _topic_faults(SETTINGS, EVENTS, Topic(6, 1, (2, 4)), 3)
    assert "one replica, though there are 3 brokers" in alone
    assert "run `kafka-reassign-partitions.sh --bootstrap-server kafka:9092 " in alone
    assert "partition 2, 4" in leaderless
