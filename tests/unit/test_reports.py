import logging

import pytest

from relay.reports import MOST_FAULTS, QUIET_SECONDS, Reports


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def counts(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    return [(vars(record)["type"], vars(record)["events"]) for record in caplog.records]


def test_a_fault_is_told_at_once_and_then_once_a_minute_with_the_count(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    reports = Reports(clock)
    for _ in range(1000):
        reports.invalid("Message", "/agent: required")
    assert counts(caplog) == [("Message", 1)]
    clock.now += QUIET_SECONDS
    for _ in range(10):
        reports.invalid("Message", "/agent: required")
    assert counts(caplog) == [("Message", 1), ("Message", 1000)]


def test_each_fault_of_each_type_is_told(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    reports = Reports(clock)
    for type_name, fault in (("Message", "/a: type"), ("Message", "/b: type"), ("LivechatEdit", "/a: type")) * 5:
        reports.invalid(type_name, fault)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert len(set(caplog.messages)) == 3


def test_endless_kinds_of_faults_are_told_together(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    reports = Reports(clock)
    for number in range(MOST_FAULTS + 500):
        reports.invalid("Message", f"/messages/{number}/msg: type")
    assert len([record for record in caplog.records if record.name == "relay.reports"]) == MOST_FAULTS + 1
