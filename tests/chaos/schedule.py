"""Which fault comes when: from a seed, the same each time. What each fault is, and what it excuses, stands here."""

import json
import random
from dataclasses import asdict, dataclass
from typing import NamedTuple

RELAY, DISK, CLOCK, PROXY, REGISTRY, TOPIC, SENDERS = "relay", "disk", "clock", "proxy", "registry", "topic", "senders"
BROKERS = ("broker 0", "broker 1", "broker 2")
#: Of that many faults each, everything that was accepted is waited for and judged.
CHECK_EVERY = 25
#: The share of faults after which nothing else happens until the relay has recovered, so that this can be measured.
_MEASURED = 0.2
#: Kinds that may last for so many seconds are left out of a quick run.
_SLOW = 10.0


class Kind(NamedTuple):
    """A kind of fault."""

    name: str
    #: How often it comes, relative to the others.
    weight: float
    #: Seconds for which it lasts, at least and at most; those of its own work come on top.
    seconds: tuple[float, float]
    #: What it has to itself: other faults that do not touch these may come meanwhile. BROKERS[0] stands for one of
    #: them.
    takes: tuple[str, ...]
    clusters: tuple[int, ...] = (1, 3)
    #: "compiler" or "registry", if it cannot be had without.
    needs: str = ""
    #: What the oracle must excuse, and no more than that.
    excuses: str = ""

    @property
    def slow(self) -> bool:
        """Whether it takes so long that a short run leaves it out."""
        return self.seconds[1] >= _SLOW


KINDS = (
    # --- The relay. ---
    Kind("relay killed", 20, (0, 1), (RELAY,)),
    Kind("relay stopped", 5, (0, 1), (RELAY,)),
    Kind("relay frozen", 4, (0.5, 7), (RELAY,)),
    Kind("relay frozen beyond the transaction timeout", 1, (42, 45), (RELAY,)),
    Kind(
        "frozen relay thawed beside its successor",
        1.5,
        (2, 5),
        (RELAY, PROXY, DISK, *BROKERS),
        excuses="An event of which both relays took a try, because the first had not answered it, lands twice: each "
        "has a spool of its own. Its order is that of its first record.",
    ),
    Kind("second relay on a copy of the spool", 1.5, (2, 5), (RELAY, PROXY, DISK, *BROKERS)),
    Kind("clock an hour forth", 3, (1, 3), (RELAY, CLOCK), needs="compiler"),
    Kind("clock an hour back", 3, (1, 3), (RELAY, CLOCK), needs="compiler"),
    Kind(
        "relay restarted with its clock an hour off",
        2,
        (0, 2),
        (RELAY, CLOCK),
        needs="compiler",
        excuses="A relay that starts finds what it took before an hour old, and has forgotten it: the retry of a "
        "delivery that it had taken and not answered lands a second time, with the same `ce_id`.",
    ),
    # --- Its disk. ---
    Kind("disk full", 4, (0.3, 2), (DISK,), needs="compiler"),
    Kind("disk error on write", 3, (0.3, 2), (DISK,), needs="compiler"),
    Kind("disk error on fsync", 3, (0.3, 2), (DISK,), needs="compiler"),
    Kind("spool file cannot grow", 2, (0.5, 2), (RELAY, DISK)),
    Kind(
        "last frames of the WAL torn",
        4,
        (0, 0),
        (RELAY, DISK),
        needs="compiler",
        excuses="Nothing: only a transaction is torn that was not yet fsynced, and so not yet answered.",
    ),
    # --- The senders. ---
    Kind(
        "senders cut off",
        8,
        (0, 1),
        (SENDERS,),
        excuses="`LivechatSessionQueued`, `LivechatEdit`, `LeadCapture` and types that nobody knows may repeat for "
        "real. When the answer to one is lost on its way, the relay takes the retry for such a repeat: an event of its "
        "own, with its own `ce_id`.",
    ),
    # --- The network. ---
    Kind("connections to Kafka reset", 10, (0, 0.5), (PROXY,)),
    Kind("connections to Kafka cut in the middle", 8, (0, 0.5), (PROXY,)),
    Kind("connections to Kafka delayed", 4, (1, 4), (PROXY,)),
    # --- Kafka. ---
    Kind("broker killed", 3, (0, 4), BROKERS[:1]),
    Kind("broker restarted", 2, (0, 0), BROKERS[:1]),
    Kind("broker frozen", 4, (0.5, 4), BROKERS[:1]),
    Kind("broker frozen beyond the request timeout", 1, (12, 15), BROKERS[:1]),
    Kind("broker frozen beyond the transaction timeout", 0.7, (42, 45), BROKERS[:1]),
    Kind("all brokers restarted", 0.7, (0, 0), (TOPIC, *BROKERS)),
    Kind("two of three brokers down", 1, (2, 8), BROKERS, clusters=(3,)),
    Kind("in-sync replicas below the minimum", 1, (2, 8), (TOPIC, *BROKERS), clusters=(3,)),
    Kind("leaders moved", 1.5, (0, 0), (TOPIC, *BROKERS), clusters=(3,)),
    Kind("transaction coordinator and relay killed", 1.5, (0, 3), (RELAY, *BROKERS)),
    Kind("partition without a leader", 1, (2, 8), BROKERS, clusters=(3,)),
    Kind(
        "topic deleted and made again",
        1,
        (0, 3),
        (TOPIC, PROXY, RELAY, SENDERS, DISK, CLOCK, *BROKERS),
        excuses="Nothing: before it is deleted the senders pause, until all that they sent was read. What is sent "
        "while there is no topic lands on the new one.",
    ),
    Kind(
        "max.message.bytes below a body",
        1.5,
        (1, 3),
        (TOPIC, PROXY, RELAY, *BROKERS),
        excuses="A body that is larger is dead: announced once on the dead-letter topic, without its body. "
        "Smaller ones land as ever.",
    ),
    # --- The schema registry. ---
    Kind("schema registry down", 1.5, (0, 3), (RELAY, REGISTRY), needs="registry"),
)


@dataclass(frozen=True)
class Step:
    """One fault of a schedule."""

    number: int
    kind: str
    #: Seconds from the beginning of the fault before it.
    pause: float
    #: Seconds that it lasts.
    seconds: float
    #: The broker that it hits, if it hits one.
    broker: int
    #: Whether nothing else happens meanwhile, and until the relay has recovered.
    measured: bool
    #: Where a fault has a choice.
    seed: int

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def kinds(cluster: int, *, quick: bool) -> list[Kind]:
    """The kinds on a cluster of so many brokers; with *quick* without those that take long, or need a registry."""
    known = [kind for kind in KINDS if cluster in kind.clusters]
    return [kind for kind in known if not (quick and (kind.slow or kind.needs == "registry"))]


def schedule(seed: int, faults: int, cluster: int, *, quick: bool = False) -> list[Step]:
    """
    *faults* steps for a cluster of so many brokers.

    Each kind comes once before any comes by chance, if there are enough steps for that; unless *quick*, it is measured.
    """
    rng = random.Random(f"{seed}/{cluster}")
    known = kinds(cluster, quick=quick)
    chosen = rng.sample(known, len(known))[:faults]
    chosen += rng.choices(known, [kind.weight for kind in known], k=faults - len(chosen))
    rng.shuffle(chosen)
    seen: set[str] = set()
    steps = []
    for number, kind in enumerate(chosen, 1):
        steps.append(
            Step(
                number,
                kind.name,
                pause=round(rng.uniform(0, 1.5), 3),
                seconds=round(rng.uniform(*kind.seconds), 3),
                broker=rng.randrange(cluster),
                measured=rng.random() < _MEASURED or (not quick and kind.name not in seen),
                seed=rng.getrandbits(32),
            )
        )
        seen.add(kind.name)
    return steps
