from collections.abc import Mapping

import pytest

from relay.cluster import Cluster, Topic
from relay.connection import Connection
from relay.errors import KafkaDenied, KafkaLost, KafkaTimeout, KafkaUnreachable
from relay.kafka import MAX_RECORDS, Producer, TopicPlan
from relay.publisher import MAX_EVENTS


class Answering(Cluster):
    """A cluster of which a broker or two are not well."""

    def __init__(self, *answers: KafkaLost | None) -> None:
        super().__init__(Connection("127.0.0.1:1", "test"))
        self.answers = [*answers]

    async def topics(self, having: object = ()) -> Mapping[str, Topic]:  # noqa: ARG002 (as the real one)
        """None, or the next answer if somebody is asked in vain."""
        if len(self.answers) > 1 and (answer := self.answers.pop(0)):
            raise answer
        return {}

    async def fault(self) -> KafkaLost | None:
        """The last answer."""
        return self.answers[-1]


def test_a_producer_is_spent_before_its_sequence_numbers_are() -> None:
    # Of one partition, which may get them all: the last cycle of a producer begins below the limit. They end at 2^31.
    assert MAX_RECORDS + MAX_EVENTS + 1 < 1 << 31


DENIED, AWAY, LATE = KafkaDenied("broker 2: expired"), KafkaUnreachable("broker 2: gone"), KafkaTimeout()


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ((DENIED,), DENIED),
        ((DENIED, None), DENIED),
        ((AWAY, DENIED), DENIED),
        # Which may be back at any time: that it was late says as much.
        ((AWAY,), LATE),
        ((None,), LATE),
    ],
)
async def test_what_was_late_because_a_broker_lets_nobody_in_is_told_as_that(
    answers: tuple[KafkaLost | None, ...], told: KafkaLost
) -> None:
    plan = TopicPlan(["events"], None, create=False, max_message_bytes=1000)
    producer = Producer(Connection("127.0.0.1:1", "test"), plan, "spool", None)
    producer._cluster = Answering(*answers)
    assert await producer._explained(LATE) is told
