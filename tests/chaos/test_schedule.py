"""The schedule of the fault harness: whole, the same each time, and understood by what does the faults."""

import pytest

from chaos.run import FAULTS
from chaos.schedule import KINDS, kinds, schedule


def test_the_same_seed_gives_the_same_schedule_and_another_one_another() -> None:
    assert schedule(1, 200, 3) == schedule(1, 200, 3)
    assert schedule(1, 200, 3) != schedule(2, 200, 3)
    assert schedule(1, 200, 3) != schedule(1, 200, 1)


def test_every_kind_can_be_done() -> None:
    assert {kind.name for kind in KINDS} == set(FAULTS)


@pytest.mark.parametrize("cluster", [1, 3])
def test_a_schedule_has_each_kind_there_is_on_the_cluster_and_measures_it(cluster: int) -> None:
    steps = schedule(7, 100, cluster)

    assert len(steps) == 100
    assert {step.kind for step in steps if step.measured} == {kind.name for kind in kinds(cluster, quick=False)}
    assert {step.broker for step in steps} == set(range(cluster))


@pytest.mark.parametrize("cluster", [1, 3])
def test_a_quick_schedule_has_nothing_that_takes_long(cluster: int) -> None:
    steps = schedule(7, 100, cluster, quick=True)

    assert {step.kind for step in steps} == {kind.name for kind in kinds(cluster, quick=True)}
    assert max(step.seconds for step in steps) < 10


def test_a_thousand_faults_take_about_an_hour() -> None:
    slow = {kind.name for kind in KINDS if kind.slow}
    for cluster in (1, 3):
        steps = schedule(1, 500, cluster)
        assert sum(step.seconds + step.pause for step in steps) < 30 * 60
        assert len([step for step in steps if step.kind in slow]) < 30
