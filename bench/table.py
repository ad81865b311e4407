"""The table: each measure, what it is held against, and whether it is reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Measure:
    """One row, measured.

    Attributes:
        number: In the order of the table.
        name: What is measured.
        unit: Of both columns.
        ours: One value a round.
        baseline: Likewise, of the same rounds.
        target: The ratio of ours to the baseline that is to be reached.
        at_most: Whether the ratio is to be at most the target; otherwise at least.
        also: Other conditions, in words, and whether each holds.
        notes: For the reader.
    """

    number: int
    name: str
    unit: str
    ours: Sequence[float]
    baseline: Sequence[float]
    target: float
    at_most: bool = False
    also: Sequence[tuple[str, bool]] = ()
    notes: Sequence[str] = field(default=())

    @property
    def ratios(self) -> list[float]:
        """Of each round: both were measured next to each other."""
        return [ours / max(baseline, 1e-9) for ours, baseline in zip(self.ours, self.baseline, strict=True)]

    @property
    def reached(self) -> bool:
        """Whether the median ratio and every other condition hold."""
        ratio = statistics.median(self.ratios)
        holds = ratio <= self.target if self.at_most else ratio >= self.target
        return holds and all(fulfilled for _, fulfilled in self.also)


def show(measures: Sequence[Measure]) -> int:
    """Prints the table and returns how many measures are reached."""
    rows = [("", "measure", "ours", "baseline", "ratio", "target", "")]
    for measure in measures:
        sign = "<=" if measure.at_most else ">="
        rows.append(
            (
                str(measure.number),
                f"{measure.name} [{measure.unit}]",
                spread(measure.ours),
                spread(measure.baseline),
                spread(measure.ratios, 2),
                f"{sign} {measure.target:g}",
                "reached" if measure.reached else "MISSED",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("median (least .. greatest) of the rounds; the ratio is that of neighbouring rounds")
    for measure in measures:
        for condition, fulfilled in measure.also:
            print(f"{measure.number}: {condition}: {'yes' if fulfilled else 'NO'}")
        for note in measure.notes:
            print(f"{measure.number}: {note}")
    return sum(measure.reached for measure in measures)


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Returns the median, the least and the greatest, in words."""
    if digits is None:
        digits = 0 if min(values) >= 100 else 2
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} .. {high:,.{digits}f})"
