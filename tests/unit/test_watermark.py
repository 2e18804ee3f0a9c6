import pytest

from relay.watermark import RUNS_NAMED, Run, Watermark

A, B, C, D = Run(1, "a"), Run(50, "b"), Run(80, "c"), Run(120, "d")


def test_a_watermark_covers_what_its_own_run_published() -> None:
    assert Watermark.at(30, [A]).covers([A]) == 30


def test_a_watermark_covers_the_runs_before_and_nothing_of_the_runs_after_it() -> None:
    assert Watermark.at(79, [A, B]).covers([A, B, C]) == 79
    assert Watermark.at(30, [A]).covers([A, B]) == 30
    # The last events of a run that another one published.
    assert Watermark.at(60, [A, B, C]).covers([A, B, C]) == 60


def test_a_watermark_names_the_runs_that_led_to_it_only() -> None:
    assert Watermark.at(49, [A, B, C]).runs == (A,)
    assert Watermark.at(50, [A, B, C]).runs == (A, B)
    assert Watermark.at(0, [A]).runs == ()


def test_nothing_is_covered_before_anything_was_published() -> None:
    assert Watermark.at(0, [A]).covers([A]) == 0
    assert Watermark.at(0, [A, B]).covers([A, B]) == 0


def test_a_spool_restored_from_a_copy_is_covered_up_to_the_copy() -> None:
    # The copy was made within run a at 30; the original went on as b and published up to 100.
    restored = [A, Run(31, "c")]
    assert Watermark.at(100, [A, B]).covers(restored) == 30


def test_a_copy_made_after_the_last_shared_run_ended_is_covered_up_to_that_end() -> None:
    restored = [A, Run(60, "c")]
    assert Watermark.at(100, [A, B]).covers(restored) == 49


def test_a_copy_that_came_further_than_kafka_is_covered_up_to_the_watermark() -> None:
    assert Watermark.at(20, [A]).covers([A, Run(31, "c")]) == 20


def test_twins_of_one_file_cover_only_what_they_share() -> None:
    first, second = [A, Run(50, "first")], [A, Run(50, "second")]
    assert Watermark.at(70, first).covers(second) == 49
    assert Watermark.at(90, second).covers(first) == 49
    assert Watermark.at(70, first).covers(first) == 70


def test_a_watermark_of_unknown_runs_covers_nothing() -> None:
    assert Watermark.at(100, [A, B]).covers([Run(1, "x"), Run(50, "y")]) == 0
    assert Watermark.at(100, [A, B]).covers([]) == 0


def test_a_history_that_was_pruned_on_both_sides_is_still_shared() -> None:
    runs = [Run(1 + 10 * number, f"run {number}") for number in range(3 * RUNS_NAMED)]
    watermark = Watermark.at(runs[-1].first_sequence + 5, runs)
    assert len(watermark.runs) == RUNS_NAMED
    assert watermark.covers(runs) == watermark.sequence
    assert watermark.covers(runs[-2:]) == watermark.sequence
    assert watermark.covers([*runs, Run(1000, "next")]) == watermark.sequence


def test_of_a_copy_older_than_every_named_run_nothing_is_known_to_be_covered() -> None:
    runs = [Run(1 + 10 * number, f"run {number}") for number in range(3 * RUNS_NAMED)]
    copy = [*runs[:2], Run(15, "restored")]
    assert Watermark.at(runs[-1].first_sequence, runs).covers(copy) == 0


def test_a_watermark_survives_its_journey() -> None:
    watermark = Watermark.at(100, [A, B])
    assert Watermark.decode(watermark.encode()) == watermark
    assert Watermark.decode(Watermark(0, ()).encode()) == Watermark(0, ())


@pytest.mark.parametrize(
    "value",
    [b"", b"12", b"null", b"[]", b"{}", b'{"sequence":1}', b'{"sequence":"x","runs":[]}', b'{"sequence":1,"runs":[1]}',
     b'{"sequence":1,"runs":[[1]]}', b"\xff"],
)  # fmt: skip
def test_what_is_no_watermark_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - it is what decode promises
        Watermark.decode(value)
