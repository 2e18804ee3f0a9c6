"""
`make chaos`, or `python -m tests.chaos --faults 1000 --seed 1`: ends with 1 unless nothing went wrong and every
fault was done that is possible here; the table names the others.

Without --cluster half of the faults are done to one broker, half to three.
"""

import argparse
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from relay.dev.download import console_progress
from relay.dev.kafka import prepare_runtime
from relay.dev.registry import prepare_registry

from .report import report
from .run import Outcome, Run
from .schedule import schedule
from .world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults, and what becomes of events.")
    parser.add_argument("--faults", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the schedule (default: any)")
    parser.add_argument("--minutes", type=float, default=90, help="at most (default: %(default)s)")
    parser.add_argument("--cluster", type=int, choices=(1, 3), help="brokers (default: first 1, then 3)")
    parser.add_argument("--rate", type=float, default=1000, help="events a second (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only faults under 20 s, and no schema registry")
    parser.add_argument("--list", action="store_true", help="print the schedule and do nothing")
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where spools and brokers are: a real disk (%(default)s)"
    )
    arguments = parser.parse_args()
    clusters = [arguments.cluster] if arguments.cluster else [1, 3]
    faults = [arguments.faults // len(clusters)] * len(clusters)
    faults[-1] += arguments.faults - sum(faults)
    with console_progress("Kafka") as on_progress:
        prepare_runtime(on_progress)
    if not arguments.quick:
        with console_progress("Registry") as on_progress:
            prepare_registry(on_progress)
    # However it ends, nothing of it stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = False
    for cluster, count in zip(clusters, faults, strict=True):
        arguments.cluster, arguments.faults = cluster, count
        failed |= not _run(arguments)
    return int(failed)


def _run(arguments: argparse.Namespace) -> bool:
    steps = schedule(arguments.seed, arguments.faults, arguments.cluster, quick=arguments.quick)
    if arguments.list:
        print(*steps, sep="\n")
        return True
    directory = Path(tempfile.mkdtemp(prefix="relay-chaos-", dir=arguments.dir))
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {line}", file=sys.stderr, flush=True)

    command = _command(arguments)
    say(f"{command}: in {directory}")
    with (directory / "schedule.log").open("w") as journal:
        journal.write(f"{command}\n")
        world = World(
            directory,
            cluster=arguments.cluster,
            seed=arguments.seed,
            rate=arguments.rate,
            registry=not arguments.quick,
        )
        with world:
            outcome = Run(world, steps, seconds=arguments.minutes * 60, journal=journal, say=say).run()
    print(f"\n{report(outcome, world.ledger, cluster=arguments.cluster)}\n\nCommand: {command}")
    return _keep_evidence(outcome, directory)


def _command(arguments: argparse.Namespace) -> str:
    words = ["python", "-m", "tests.chaos", *(["--quick"] if arguments.quick else [])]
    options = {name: getattr(arguments, name) for name in ("faults", "seed", "minutes", "cluster", "rate")}
    return shlex.join([*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


def _keep_evidence(outcome: Outcome, directory: Path) -> bool:
    if outcome.failure is None and not outcome.late:
        shutil.rmtree(directory)
        return True
    for broker in (directory / "kafka").glob("broker-*"):
        shutil.rmtree(broker / "data", ignore_errors=True)
    print(
        f"\nFAILED: {outcome.failure or 'the time was up'}\n\nSchedule, logs and spools are in {directory}", flush=True
    )
    return False


if __name__ == "__main__":
    sys.exit(main())
