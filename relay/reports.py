"""What is invalid and published all the same: told once for each fault, then at most once a minute with the count."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

#: Seconds for which a fault that was told is only counted.
QUIET_SECONDS = 60.0
#: Faults that are told apart; the place in a body is part of one, and a body may have it anywhere.
MOST_FAULTS = 1000
_OTHERS = ("other", "one of many faults")


@dataclass(slots=True)
class _Told:
    at: float
    since: int = 0


class Reports:
    """The log lines of RELAY_SCHEMA_VALIDATION=report."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[tuple[str, str], _Told] = {}

    def invalid(self, type_name: str, fault: str) -> None:
        """Tells of an invalid event, or counts it for the next time."""
        key = (type_name, fault)
        if key not in self._told and len(self._told) >= MOST_FAULTS:
            key = _OTHERS
        now = self._clock()
        told = self._told.get(key)
        if told is not None and now - told.at < QUIET_SECONDS:
            told.since += 1
            return
        count = 1 + (told.since if told else 0)
        self._told[key] = _Told(now)
        extra = {"action": "event_invalid", "type": key[0], "events": count}
        log.warning("%d invalid: %s: %s; published all the same.", count, *key, extra=extra)
