"""`relay check` on a real Kafka: what it says to run does mend what it found."""

import asyncio
import shlex
import subprocess
from collections.abc import Callable

import pytest
from kafka_for_tests import FoundKafka

from relay.check_kafka import kafka_findings
from relay.config import Settings
from relay.dev.kafka import LocalKafka
from relay.dev.kafka_runtime import Runtime
from relay.finding import Finding


@pytest.fixture
def settings(kafka: FoundKafka, topic_name: str) -> Settings:
    """Return those of a relay with topics that nobody has made."""
    return settings_on(kafka, topic_name)


def settings_on(kafka: FoundKafka | LocalKafka, topic: str, **others: str) -> Settings:
    return Settings.read(
        {
            "RELAY_TOKEN": "t",
            "RELAY_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "RELAY_TOPIC": topic,
            "RELAY_DEAD_LETTER_TOPIC": f"{topic}.dead-letter",
            "RELAY_WATERMARK_TOPIC": f"{topic}.watermarks",
            **others,
        }
    )


async def findings(settings: Settings) -> list[Finding]:
    return await kafka_findings(settings, [settings.topic, settings.dead_letter_topic])


async def failures(settings: Settings) -> list[Finding]:
    return [finding for finding in await findings(settings) if not finding.ok]


def command_of(finding: Finding) -> list[str]:
    """What it says to run."""
    return shlex.split(finding.text.partition("`")[2].partition("`")[0])


async def test_settings_of_topics_that_do_not_fit_are_mended_by_what_it_says(
    kafka: FoundKafka, settings: Settings, kafka_runtime: Runtime
) -> None:
    kafka.create_topics(settings.topic, config={"cleanup.policy": "compact"})
    refusing = {"max.message.bytes": "1000", "message.timestamp.before.max.ms": "3600000"}
    kafka.create_topics(settings.dead_letter_topic, config=refusing)
    kafka.create_topics(settings.watermark_topic, config={"cleanup.policy": "compact,delete"})
    found = await failures(settings)
    assert {(it.subject.removeprefix("topic "), it.text.partition("=")[0]) for it in found} == {
        (settings.topic, "cleanup.policy"),
        (settings.topic, "max.message.bytes"),
        (settings.dead_letter_topic, "max.message.bytes"),
        (settings.dead_letter_topic, "message.timestamp.before.max.ms"),
        (settings.watermark_topic, "cleanup.policy"),
    }

    for finding in found:
        tool, *arguments = command_of(finding)
        assert tool == "kafka-configs.sh"
        run = kafka_runtime.command("kafka.admin.ConfigCommand", *arguments)
        await asyncio.to_thread(subprocess.run, run, check=True, timeout=120)

    assert await failures(settings) == []


async def test_a_missing_topic_is_told_with_what_makes_it_and_is_not_made(
    own_kafka: Callable[..., LocalKafka], topic_name: str
) -> None:
    # Where a topic could come into being by being asked for.
    kafka = await asyncio.to_thread(own_kafka, properties={"auto.create.topics.enable": "true"})
    settings = settings_on(kafka, topic_name)
    for _ in range(2):
        found = await failures(settings)
        assert {it.subject for it in found} == {
            f"topic {name}" for name in (settings.topic, settings.dead_letter_topic, settings.watermark_topic)
        }
    for finding in found:
        tool, *options = command_of(finding)
        assert (tool, "--create" in options) == ("kafka-topics.sh", True)
        configs = dict(option.split("=") for option in options if "=" in option)
        kafka.create_topics(finding.subject.removeprefix("topic "), config=configs)
    assert await failures(settings) == []


async def test_a_missing_topic_that_serving_creates_is_no_fault(kafka: FoundKafka, topic_name: str) -> None:
    creating = settings_on(kafka, topic_name, RELAY_TOPIC_CREATE="true")
    found = await findings(creating)
    assert [it.text for it in found if it.subject.startswith("topic ")] == ["missing; `relay serve` creates it"] * 3
    assert len(await failures(settings_on(kafka, topic_name))) == 3


async def test_without_transactions_neither_their_id_nor_watermarks_are_asked_for(
    kafka: FoundKafka, topic_name: str
) -> None:
    found = await findings(settings_on(kafka, topic_name, RELAY_DELIVERY="at-least-once"))
    assert [it.subject for it in found] == ["kafka", f"topic {topic_name}", f"topic {topic_name}.dead-letter"]


async def test_a_kafka_that_is_not_there_is_one_fault(topic_name: str) -> None:
    nowhere = settings_on(FoundKafka("127.0.0.1:1", "none"), topic_name)
    (found,) = await failures(nowhere)
    assert found.subject == "kafka"
    assert "RELAY_KAFKA_BOOTSTRAP_SERVERS" in found.text
