"""
`make mutants`, or `python -m tests.mutants [WORD…]`: only those with the words in their name, if there are any.

Prints which test caught which mutant, and ends with 1 if one survived or if a test fails without any.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from relay.dev.download import console_progress
from relay.dev.kafka import LocalKafka, prepare_runtime

from .catalogue import MUTANTS

ROOT = Path(__file__).parents[2]
#: What the tests need of the project.
PARTS = ("relay", "tests", "schemas", "deploy", "pyproject.toml", "README.md", "Makefile", "CHANGELOG.md")
#: Seconds for the tests of one mutant.
TIMEOUT = 1800
FAILED, PASSED, NOT_RUN = "failed", "passed", "not run"


def main(words: Sequence[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.caught_by))
    with console_progress("Kafka") as on_progress:
        runtime = prepare_runtime(on_progress)
    with tempfile.TemporaryDirectory() as directory, LocalKafka(runtime=runtime) as kafka:
        copy = Path(directory)
        environ = {**os.environ, "RELAY_TEST_KAFKA": kafka.bootstrap_servers, "PYTHONPATH": str(copy)}
        copy_project(copy)
        wrong = tried("no mutant", tests, copy, environ, right=(PASSED, NOT_RUN))
        for mutant in chosen:
            copy_project(copy)
            mutant.apply(copy / "relay")
            wrong += tried(mutant.name, mutant.caught_by, copy, environ, right=(FAILED,))
    print("", *wrong, sep="\n")
    print(f"{len(chosen)} mutants, {'all caught' if not wrong else 'and something is wrong'}")
    return bool(wrong)


def tried(name: str, tests: Sequence[str], copy: Path, environ: dict[str, str], *, right: Sequence[str]) -> list[str]:
    """Runs *tests* and prints what came of each; returns what is wrong about it."""
    print(f"\n{name}", flush=True)
    wrong = []
    for test, (outcome, seconds) in run(copy, tests, environ).items():
        as_expected = outcome in right
        print(f"{seconds:6.1f} s  {outcome if as_expected else outcome.upper()}  {test}", flush=True)
        if not as_expected:
            wrong.append(f"{name}: {outcome}: {test}")
    return wrong


def copy_project(copy: Path) -> None:
    for part in PARTS:
        shutil.rmtree(copy / part, ignore_errors=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)


def run(copy: Path, tests: Sequence[str], environ: dict[str, str]) -> dict[str, tuple[str, float]]:
    """Runs the *tests* on the relay in *copy*; says of each what came of it, and how long it took."""
    report = copy / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--show-capture=no", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    ended = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    cases = list(ET.parse(report).iter("testcase"))
    return {test: what_came_of(test, cases) for test in tests}


def what_came_of(test: str, cases: Sequence[ET.Element]) -> tuple[str, float]:
    """Of *test*, which may be many: it failed if one of them did."""
    dotted = test.replace(".py", "").replace("/", ".").replace("::", ".")
    mine = [case for case in cases if f"{case.get('classname')}.{case.get('name')}".startswith(dotted)]
    seconds = sum(float(case.get("time", 0)) for case in mine)
    if any(case.find("failure") is not None for case in mine):
        return FAILED, seconds
    return PASSED if any(len(case) == 0 for case in mine) else NOT_RUN, seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
