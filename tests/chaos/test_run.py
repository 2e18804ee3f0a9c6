"""A short run of `make chaos` on both clusters: the long one is for people."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.schedule import KINDS, kinds, schedule
from chaos.syscalls import compiler

_ROOT = Path(__file__).parents[2]
_FAULTS = 16
#: By cluster. Between them they have each kind that is not left out of a quick run.
_SEEDS = {1: 1362, 3: 3848}


def test_the_short_runs_have_each_kind_of_fault_that_takes_no_long_time() -> None:
    done = {step.kind for cluster, seed in _SEEDS.items() for step in schedule(seed, _FAULTS, cluster, quick=True)}

    assert done == {kind.name for cluster in _SEEDS for kind in kinds(cluster, quick=True)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("cluster", "seed"), _SEEDS.items())
def test_nothing_is_missing_doubled_or_reordered_in_a_short_run(cluster: int, seed: int, tmp_path: Path) -> None:
    possible = {kind.name for kind in KINDS if compiler() or kind.needs != "compiler"}
    steps = [step for step in schedule(seed, _FAULTS, cluster, quick=True) if step.kind in possible]
    options = {"faults": _FAULTS, "seed": seed, "cluster": cluster, "minutes": 4, "rate": 200, "dir": tmp_path}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}

    ended = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--quick", *arguments],
        cwd=_ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout
    assert re.findall(r"^\| all +\| (\d+) ", ended.stdout, re.MULTILINE) == [str(len(steps))]
    seconds, rate = re.findall(r"(\d+) s, (\d+) events/s accepted", ended.stdout)[0]
    assert int(seconds) * int(rate) > 1_000, ended.stdout
