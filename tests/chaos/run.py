"""One run: does the faults of a schedule, several at once where they do not touch each other, and watches."""

import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TextIO

from relay_process import wait_until

from . import kafka_faults, relay_faults
from .schedule import BROKERS, CHECK_EVERY, KINDS, RELAY, Kind, Step
from .syscalls import compiler
from .world import PATIENCE, NoEffect, World

FAULTS = relay_faults.FAULTS | kafka_faults.FAULTS
_KINDS = {kind.name: kind for kind in KINDS}
#: Faults at once.
_AT_ONCE = 4
#: How often a fault is done that has no effect, until it has one.
_TRIES = 5
#: Seconds between two looks at what has landed.
_READ_EVERY = 2.0


class RunFailed(Exception):
    """Something was lost, doubled, reordered, corrupted or invented; or the relay, or the harness, broke down."""


@dataclass
class Outcome:
    """What came of a run."""

    #: By kind: how often it was done, and the seconds that recovering from it took where that was measured.
    done: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    #: How often everything accepted was waited for, and the seconds that took.
    checks: list[float] = field(default_factory=list)
    #: Why a kind was left out, by kind.
    impossible: dict[str, str] = field(default_factory=dict)
    #: How many faults were not done because the time was up.
    late: int = 0
    seconds: float = 0.0
    failure: str | None = None


class Run:
    """Does *steps* to *world*, whose with-block must be entered, for *seconds* at most; logs each to *journal*."""

    def __init__(
        self, world: World, steps: list[Step], *, seconds: float, journal: TextIO, say: Callable[[str], None]
    ) -> None:
        self._world = world
        self._steps = steps
        self._seconds = seconds
        self._journal = journal
        self._say = say
        self._begun = time.monotonic()
        #: What is taken by a fault under way.
        self._taken: set[str] = set()
        self._free = threading.Condition()
        self._failure: str | None = None
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Does it all; what went wrong is in the outcome."""
        reader = threading.Thread(target=self._keep_reading, name="oracle")
        reader.start()
        try:
            with ThreadPoolExecutor(_AT_ONCE) as faults, self._world.load:
                try:
                    self._do_all(faults)
                    self._check()
                finally:
                    self._world.over.set()
            self._finish()
        except RunFailed as failure:
            self.outcome.failure = str(failure)
        except Exception:  # noqa: BLE001 (whatever it is, there is a table to print and evidence to keep)
            self.outcome.failure = traceback.format_exc()
        finally:
            self._world.over.set()
            reader.join()
        self.outcome.seconds = time.monotonic() - self._begun
        return self.outcome

    def _do_all(self, faults: ThreadPoolExecutor) -> None:
        self._world.wait_until_recovered()
        for step in self._steps:
            if time.monotonic() > self._begun + self._seconds:
                self._say(f"the time is up before fault {step.number}")
                left = self._steps[step.number - 1 :]
                self.outcome.late = sum(not self._impossible(_KINDS[it.kind]) for it in left)
                break
            kind = _KINDS[step.kind]
            if reason := self._impossible(kind):
                self.outcome.impossible[kind.name] = reason
                continue
            time.sleep(step.pause)
            takes = self._takes(kind, step)
            if step.measured:
                self._wait_until_free()
            self._take(takes)
            faults.submit(self._do, step, takes)
            if step.measured:
                self._wait_until_free()
            if step.number % CHECK_EVERY == 0:
                self._check()

    def _impossible(self, kind: Kind) -> str | None:
        if kind.needs == "compiler" and not compiler():
            return "not possible here: no C compiler"
        if kind.needs == "registry" and self._world.registry is None:
            return "left out: no schema registry in this run"
        return None

    @staticmethod
    def _takes(kind: Kind, step: Step) -> set[str]:
        # One broker is the one that the step names.
        return (
            set(kind.takes)
            if BROKERS[1] in kind.takes
            else {BROKERS[step.broker] if it == BROKERS[0] else it for it in kind.takes}
        )

    # --- One fault. ---

    def _take(self, takes: set[str]) -> None:
        with self._free:
            while not self._taken.isdisjoint(takes):
                self._raise_failure()
                self._free.wait(1)
            self._raise_failure()
            self._taken |= takes

    def _wait_until_free(self) -> None:
        with self._free:
            while self._taken:
                self._free.wait(1)
            self._raise_failure()

    def _do(self, step: Step, takes: set[str]) -> None:
        begun = time.monotonic()
        noted: str | None = None
        try:
            noted = self._effective(step)
            ended = time.monotonic()
            self.outcome.done[step.kind] += 1
            if step.measured:
                self._world.wait_until_recovered(ended)
                self.outcome.recoveries[step.kind].append(time.monotonic() - ended)
        except Exception:  # noqa: BLE001 (it ends the run)
            self._failure = f"fault {step.number}, {step.kind}:\n{traceback.format_exc()}"
        finally:
            self._log(step, begun, noted)
            with self._free:
                self._taken -= takes
                self._free.notify_all()

    def _effective(self, step: Step) -> str | None:
        for left in reversed(range(_TRIES)):
            try:
                return FAULTS[step.kind](self._world, step)
            except NoEffect:
                if not left:
                    raise
        raise AssertionError("not reached")

    def _log(self, step: Step, begun: float, noted: str | None) -> None:
        place = f"{begun - self._begun:8.2f} s  {time.monotonic() - begun:6.2f} s"
        self._journal.write(f"{place}  {step}{f'  {noted}' if noted else ''}\n")
        self._journal.flush()

    def _raise_failure(self) -> None:
        if self._failure is None and RELAY not in self._taken and self._world.relay.ended:
            # Nobody asked it to.
            self._failure = f"the relay has ended by itself:\n{self._world.relay.log_tail()}"
        if self._failure is None and self._world.ledger.faults:
            self._failure = f"{dict(self._world.ledger.faults)}"
        if self._failure is not None:
            raise RunFailed(self._failure)

    # --- What lands. ---

    def _keep_reading(self) -> None:
        while not self._world.over.wait(_READ_EVERY):
            try:
                self._world.read()  # Or later, if Kafka is away.
            except Exception:  # noqa: BLE001 (it ends the run)
                self._failure = f"the oracle broke down:\n{traceback.format_exc()}"
                return

    def _check(self) -> None:
        """Everything that has been accepted is there."""
        self._wait_until_free()
        begun = time.monotonic()
        self._world.wait_until_recovered(begun)
        self._wait_for_landing(begun)
        self.outcome.checks.append(time.monotonic() - begun)
        self._world.ledger.retire()
        ledger, world = self._world.ledger, self._world
        done = sum(self.outcome.done.values())
        self._say(
            f"{done} of {len(self._steps)} faults, {ledger.accepted} events accepted "
            f"({ledger.accepted / (time.monotonic() - self._begun):.0f}/s), {ledger.published} published, all is there "
            f"after {self.outcome.checks[-1]:.1f} s; excused: {dict(ledger.excused)}; tries: {dict(world.load.tries)}"
        )

    def _wait_for_landing(self, answered_before: float) -> None:
        def landed() -> bool:
            complete = self._world.read()
            self._raise_failure()
            return complete and not self._world.ledger.missing(answered_before)

        try:
            wait_until(landed, "everything accepted is there", seconds=PATIENCE, pause=0.2)
        except AssertionError:
            missing = self._world.ledger.missing(answered_before)
            for id_ in missing:
                self._world.ledger.blame("missing", id_)
            raise RunFailed(f"{len(missing)} events are missing, or a transaction is open for ever") from None

    def _finish(self) -> None:
        """After the load: the relay publishes the rest, and ends as it should."""
        world = self._world
        world.relay.wait_until_drained(seconds=PATIENCE)
        code = world.relay.stop()
        world.read_to_the_end()
        world.judge_schema_ids()
        world.judge_dead_events()
        world.ledger.close()
        if world.ledger.faults:
            raise RunFailed(f"{dict(world.ledger.faults)}")
        if code:
            raise RunFailed(f"the relay ended with exit code {code}")
