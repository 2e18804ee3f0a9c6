"""`relay schemas` before a deployment, on a real registry; `relay dev --registry`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.cli import main
from relay.schemas import Schemas

SAVED = next(schema for schema in Schemas.load() if schema.name == "message-saved")


@pytest.fixture
def evolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Return a function that changes the schema of messages for the next commands."""
    monkeypatch.setenv("RELAY_SCHEMAS_DIR", str(tmp_path))

    def evolve(change: Callable[[dict[str, Any]], object]) -> None:
        document = json.loads(SAVED.text)
        change(document)
        (tmp_path / "message-saved.json").write_text(json.dumps(document))

    return evolve


def test_a_pipeline_is_told_whether_the_next_schemas_would_be_accepted(
    registry_url: str,
    topic_name: str,
    evolve: Callable[[Callable[[dict[str, Any]], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RELAY_SCHEMA_REGISTRY_URL", registry_url)
    monkeypatch.setenv("RELAY_TOPIC", topic_name)

    def relay(action: str) -> tuple[int, dict[str, str]]:
        code = main(["schemas", action, "--json"])
        return code, {
            it["subject"].partition("omnichannel.")[2]: it["standing"] for it in json.loads(capsys.readouterr().out)
        }

    assert set(relay("check")[1].values()) == {"new"}
    assert set(relay("register")[1].values()) == {"registered"}
    assert set(relay("check")[1].values()) == {"registered"}

    evolve(lambda it: it["properties"].update(added={"type": "string"}))
    code, standing = relay("check")
    assert (code, standing.pop("message.saved"), set(standing.values())) == (0, "compatible", {"registered"})
    assert relay("register")[0] == 0
    assert relay("check")[1]["message.saved"] == "registered"

    for change in (
        lambda it: it["properties"].pop("label"),
        lambda it: it["properties"].update(_id={"type": "number"}),
    ):
        evolve(change)
        for action in ("check", "register"):
            code, standing = relay(action)
            assert (code, standing["message.saved"]) == (1, "incompatible")


def test_dev_with_a_registry_frames_the_chat_that_it_plays(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    options = ["--registry", "--play", "--once", "--port", "0", "--admin-port", "0"]
    command = [sys.executable, "-m", "relay", "dev", *options]

    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)

    assert ran.returncode == 0, ran.stderr
    assert "Schema registry  http://127.0.0.1:" in ran.stdout
    landed = [line for line in ran.stdout.splitlines() if "  schema " in line]
    assert f"A whole chat: {len(landed)} events, each on Kafka once, in order." in ran.stdout
