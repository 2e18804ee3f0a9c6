"""What the README says is what the code does."""

import re

import pytest
from docs import README, rendered

from relay.cli import main
from relay.config import Settings, settings_table
from relay.metrics import HTTP_CODES

TEXT = README.read_text()


def test_tables_are_as_declared() -> None:
    assert rendered(TEXT) == TEXT, "run `make docs`"


def test_every_setting_named_exists() -> None:
    known = set(re.findall(r"RELAY_\w+", settings_table())) | {"RELAY_TEST_KAFKA", "RELAY_TEST_REGISTRY"}
    assert set(re.findall(r"RELAY_\w*\w", TEXT)) - {"RELAY_"} <= known


def test_every_metric_named_exists() -> None:
    table = re.search(r"<!-- metrics -->(.*)<!-- /metrics -->", TEXT, re.DOTALL)
    assert table
    declared = set(re.findall(r"`(relay_\w+)`", table[1]))
    headers = {
        "relay_sequence",
        "relay_received_at",
        "relay_error_reason",
        "relay_error_detail",
        "relay_schema_error",
        "relay_replayed",
    }
    assert set(re.findall(r"relay_[a-z_]+", TEXT)) <= declared | headers


def test_every_answer_is_counted() -> None:
    section = TEXT.partition("## HTTP answers")[2].partition("\n## ")[0]
    answers = set(re.findall(r"`([2-5]\d\d)`", section))
    assert answers == set(HTTP_CODES) - {"500"}


def test_every_command_exists() -> None:
    commands = set(re.findall(r"^\| `relay (\w+)", TEXT, re.MULTILINE))
    assert "serve" in commands
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0, command


def test_defaults_are_readable() -> None:
    assert Settings.read({"RELAY_TOKEN": "t"}).effective()["RELAY_HTTP_PORT"] == "8080"
