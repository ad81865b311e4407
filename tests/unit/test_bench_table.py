"""The bench's table: what counts as reached, and how the ratio is taken."""

import pytest

from bench import table
from bench.table import Measure


def test_the_ratio_is_the_median_over_neighbouring_rounds() -> None:
    # A machine that was slow in one round slows both; the ratio of the sums would be 2.4.
    measure = Measure(1, "rate", "1/s", ours=[100, 10, 30], baseline=[50, 2, 10], target=3.0)
    assert measure.ratios == [2.0, 5.0, 3.0]
    assert measure.reached


@pytest.mark.parametrize(
    ("ours", "at_most", "also", "reached"),
    [
        (2.0, False, (), True),
        (1.99, False, (), False),
        (2.0, True, (), True),
        (2.01, True, (), False),
        (2.0, False, (("no decline", True),), True),
        (2.0, False, (("no decline", True), ("no untrue answer", False)), False),
    ],
)
def test_a_row_is_reached_by_its_ratio_and_every_other_condition(
    ours: float, at_most: bool, also: tuple[tuple[str, bool], ...], reached: bool
) -> None:
    assert Measure(1, "row", "", [ours], [1.0], 2.0, at_most=at_most, also=also).reached is reached


def test_the_table_counts_and_names_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    good = Measure(1, "good", "1/s", [20.0, 30.0], [10.0, 10.0], 2.0)
    bad = Measure(2, "bad", "us", [30.0], [10.0], 2.0, at_most=True, also=[("it is true", False)], notes=["a word"])
    assert table.show([good, bad]) == 1
    printed = capsys.readouterr().out
    assert "2.50 (2.00 .. 3.00)" in printed
    assert [line.rsplit(maxsplit=1)[-1] for line in printed.splitlines()[2:4]] == ["reached", "MISSED"]
    assert "2: it is true: NO" in printed
    assert "2: a word" in printed
