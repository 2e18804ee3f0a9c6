"""
Measures the budgets: `make bench`, or `python -m tests.bench --quick`.

Prints a table that can be pasted into a note. Ends with 0 whether budgets are met or not, with 1 if something failed.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from relay.dev.download import console_progress
from relay.dev.kafka import LocalKafka, prepare_runtime

from .measure import Bench, Plan, Row
from .servers import BenchError, Cores

QUICK = Plan(rounds=2, seconds=2, slow_seconds=8, idle_seconds=5, starts=3)
FULL = Plan(rounds=5, seconds=4, slow_seconds=30, idle_seconds=10, starts=5)
_PACKAGES = ("aiohttp", "uvloop", "aiokafka", "orjson", "jsonschema-rs", "prometheus-client")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measures the budgets.")
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer and shorter rounds")
    parser.add_argument("--large", action="store_true", help="also start with a million events in the spool")
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="where the spools are: a real disk (default: %(default)s)"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.large:
        plan = plan._replace(large_spool=1_000_000)
    cores, load, begun = Cores(), os.getloadavg()[0], time.monotonic()
    rows: list[Row] = []
    with console_progress("Kafka") as on_progress:
        runtime = prepare_runtime(on_progress)
    os.sched_setaffinity(0, cores.kafka)  # Kafka inherits it.
    try:
        with (
            tempfile.TemporaryDirectory(prefix="relay-bench-", dir=arguments.dir) as directory,
            LocalKafka(runtime=runtime) as kafka,
        ):
            for step in Bench(kafka, cores, Path(directory), plan).run():
                if isinstance(step, Row):
                    rows.append(step)
                else:
                    print(f"{time.monotonic() - begun:5.0f} s  {step}", file=sys.stderr, flush=True)
    except BenchError as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n", *machine("tests.bench", cores, arguments.dir, load), sep="\n")
    return 0


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned."""
    cells = [("Figure", "Budget", "Measured", "Met?")]
    cells += [(row.figure, row.budget, row.measured, "yes" if row.met else "NO") for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def machine(module: str, cores: Cores, directory: Path, load: float) -> Iterator[str]:
    """Where and with what it was measured."""
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    model = cpu[1] if cpu else platform.machine()
    yield f"Machine: {os.cpu_count()} x {model}, {platform.system()} {platform.release()}"
    yield f"Cores: server {cores.server}, load {cores.load}, Kafka {cores.kafka}; load average at start: {load:.2f}"
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    here = [(len(place), kind) for place, kind in mounts if directory.resolve().is_relative_to(place)]
    yield f"Spool: {directory}, {max(here)[1]}; SQLite {sqlite3.sqlite_version}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    yield f"Python {platform.python_version()}, {versions}"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    yield f"Commit: {commit.stdout.strip() or 'unknown'}"
    yield f"Command: {shlex.join(['python', '-m', module, *sys.argv[1:]])}"
    yield f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


if __name__ == "__main__":
    sys.exit(main())
