"""A short run of `make chaos` on both clusters: the long one is for people."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("cluster", "seed"), [(1, 4), (3, 4)])
def test_nothing_is_missing_doubled_or_reordered_in_a_short_run(cluster: int, seed: int, tmp_path: Path) -> None:
    options = {"faults": 16, "seed": seed, "cluster": cluster, "minutes": 0.8, "rate": 200, "dir": tmp_path}
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
    assert "| Accepted" in ended.stdout
