"""With a schema registry: each event once and framed right, while the registry is away and the relay is killed."""

import json
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from acceptance.conftest import MakeRelay, OwnKafka
from acceptance.senders import Senders
from faulty_proxy import Answer, FaultyProxy, faulty_proxy
from in_thread import Do, in_thread
from kafka_for_tests import FoundKafka
from oracle import Landed, Verdict, judge, read_topics
from registry_for_tests import stub_registry
from relay_process import RelayProcess, wait_until

from relay.dev.kafka import LocalKafka

#: How long the registry is away. The long run: 3600.
OUTAGE_SECONDS = float(os.environ.get("RELAY_TEST_REGISTRY_OUTAGE_SECONDS", "30"))
KILLS = int(os.environ.get("RELAY_TEST_KILLS", "5"))
SEED = int(os.environ.get("RELAY_TEST_SEED", str(random.randrange(10**9))))
RATE = 100
SCHEMAS = [path.read_text() for path in (Path(__file__).parents[2] / "schemas").glob("*.json")]
SCHEMA_ID_HEADER = "__value_schema_id"


@dataclass
class Front:
    """A registry behind a proxy, as the relay sees it."""

    framing: str
    proxy: FaultyProxy
    do: Do
    registry_url: str

    @property
    def settings(self) -> dict[str, str]:
        return {"RELAY_SCHEMA_REGISTRY_URL": self.proxy.url, "RELAY_SCHEMA_FRAMING": self.framing}

    def frames(self, topic: str) -> dict[str, bytes]:
        """What names the schema of each `ce_type`, as the registry says itself."""
        found = {}
        for text in SCHEMAS:
            ce_type = json.loads(text)["title"]
            request = urllib.request.Request(
                f"{self.registry_url}/subjects/{quote(f'{topic}-{ce_type}')}",
                json.dumps({"schemaType": "JSON", "schema": text}).encode(),
                {"Content-Type": "application/vnd.schemaregistry.v1+json"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                known = json.load(answer)
            prefix = self.framing == "prefix"
            found[ce_type] = (
                b"\0" + known["id"].to_bytes(4, "big")
                if prefix
                else b"\1" + bytes.fromhex(known["guid"].replace("-", ""))
            )
        assert len(set(found.values())) == len(SCHEMAS)
        return found


@pytest.fixture(params=["prefix", "header"])
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    """Yield a registry for this framing: the real one, or where GUIDs are needed one that has them."""
    framing = request.param
    with ExitStack() as stack:
        if framing == "prefix":
            url = request.getfixturevalue("registry_url")
        else:
            url = stack.enter_context(in_thread(stub_registry))[0].url
        proxy, do = stack.enter_context(in_thread(lambda: faulty_proxy(url)))
        yield Front(framing, proxy, do, url)


def verdict(kafka: FoundKafka | LocalKafka, relay: RelayProcess, front: Front, senders: Senders) -> Verdict:
    topic = relay.settings["RELAY_TOPIC"]
    frames = front.frames(topic)
    landed = [bare(record, front.framing, frames) for record in read_topics(kafka.bootstrap_servers, topic)]
    return judge(senders.sent, landed, topic=topic)


def bare(record: Landed, framing: str, frames: dict[str, bytes]) -> Landed:
    """The record without its frame, which must be that of its type."""
    frame = frames[record.header("ce_type") or ""]
    value, headers = record.value or b"", dict(record.headers)
    if framing == "prefix":
        assert value[:5] == frame, record.place
        return record._replace(value=value[5:])
    assert headers.pop(SCHEMA_ID_HEADER) == frame, record.place
    return record._replace(headers=tuple(headers.items()))


@pytest.mark.timeout(240 + 2 * OUTAGE_SECONDS)
@pytest.mark.parametrize(
    "outage", [("refuses connections", OUTAGE_SECONDS), ("answers 503", OUTAGE_SECONDS / 3)], ids=lambda it: it[0]
)
def test_while_the_registry_is_away_from_the_first_second_all_is_accepted_and_then_published(
    kafka: FoundKafka, make_relay: MakeRelay, front: Front, report: Callable[[str], None], outage: tuple[str, float]
) -> None:
    fault, seconds = outage
    if fault == "answers 503":
        front.proxy.fail(Answer(503))
    else:
        front.do(front.proxy.refuse())
    relay = make_relay(kafka, **front.settings).start(connected=True)

    with Senders(relay.url, chats=32, rate=RATE) as senders:
        back_at = time.monotonic() + seconds
        while time.monotonic() < back_at:
            senders.wait_for_answers(RATE // 4, seconds=10)
        status, metrics = relay.status(), relay.metrics()
        asked = len(front.proxy.requests)
        front.proxy.mend()
        if fault != "answers 503":
            front.do(front.proxy.listen())
        back_at = time.monotonic()
        senders.wait_for_answers(RATE)
    relay.wait_until_drained(seconds=120)
    took = time.monotonic() - back_at

    assert set(senders.tries) == {200}
    assert (status["kafka"]["connected"], status["registry"]["connected"]) == (True, False)
    assert status["spool"]["events"] >= RATE * seconds / 2
    assert (metrics["relay_registry_connected"], relay.metrics()["relay_registry_connected"]) == (0, 1)
    # One line for each subject that was asked for; with nobody there, for the first alone.
    assert len(relay.log("registry_failed")) == (len(SCHEMAS) if fault == "answers 503" else 1)
    assert len(relay.log("registry_connected")) == 1
    # Ever more seldom, up to 7.5 to 15 s: ten rounds in half a minute.
    assert asked <= len(SCHEMAS) * (12 + seconds / 7.5)
    assert relay.stop() == 0
    outcome = verdict(kafka, relay, front, senders)
    report(
        f"Registry {fault} for {seconds:g} s from the first second, framing {front.framing}: {outcome}; "
        f"{asked} requests meanwhile, published within {took:.1f} s"
    )
    assert not outcome.faults


@pytest.mark.timeout(240 + 20 * KILLS)
def test_kills_at_random_moments_with_a_registry_that_comes_and_goes_lose_double_and_misframe_nothing(
    own_kafka: OwnKafka, make_relay: MakeRelay, front: Front, report: Callable[[str], None]
) -> None:
    kafka = own_kafka()
    relay = make_relay(kafka, **front.settings).start()
    rng = random.Random(SEED)

    with Senders(relay.url, seed=SEED, rate=3 * RATE) as senders:
        for number in range(KILLS):
            senders.wait_for_answers(rng.randrange(20, 3 * RATE))
            relay.kill()
            if number % 2:  # Then it frames with the ids in its spool.
                front.proxy.fail(Answer(503))
            else:
                front.proxy.mend()
            relay.start()
        senders.wait_for_answers(RATE)
        front.proxy.mend()
        senders.wait_for_answers(RATE)
    wait_until(lambda: relay.status()["registry"]["connected"], "the registry is connected", seconds=60)
    relay.wait_until_drained(seconds=120)
    assert relay.stop() == 0

    outcome = verdict(kafka, relay, front, senders)
    report(
        f"{KILLS} kills of the relay with framing {front.framing}, the registry away at every second start "
        f"(RELAY_TEST_SEED={SEED}): {outcome}"
    )
    assert not outcome.faults
