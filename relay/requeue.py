"""Takes up what `relay dead requeue` asked for, while the relay runs and when it starts."""

import asyncio
import logging
from typing import Protocol

from relay.errors import SpoolFailed, SpoolFull

log = logging.getLogger(__name__)

#: Seconds between two looks for requests.
LOOK_SECONDS = 1.0
#: Seconds from one piece of many events to the next: deliveries have the disk meanwhile.
PIECE_SECONDS = 0.05
#: Seconds after which a disk that had no room is tried again: deliveries that share the commit fail with it.
RETRY_SECONDS = 10.0


class Dead(Protocol):
    """Where dead events are."""

    async def requeue(self) -> list[int]:
        """Puts some of those that were asked for back into the queue; returns the sequences that they had."""


async def requeue_what_is_requested(dead: Dead) -> None:
    """Goes on for ever; ends only by being cancelled."""
    failed = False
    while True:
        try:
            sequences = await dead.requeue()
        except (SpoolFull, SpoolFailed) as error:
            if not failed:
                failed = True
                log.warning("Dead events stay dead for now: %s", error, extra={"action": "requeue_failed"})
            await asyncio.sleep(RETRY_SECONDS)
            continue
        failed = False
        if sequences:
            log.info(
                "Dead events are in the queue again: %s.",
                ", ".join(map(str, sequences)),
                extra={"action": "dead_requeued", "sequences": sequences},
            )
        await asyncio.sleep(PIECE_SECONDS if sequences else LOOK_SECONDS)
