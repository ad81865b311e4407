"""Events per second over a sliding window."""

from __future__ import annotations

_WINDOW_SECONDS = 10


class Rate:
    """Counts per second of the clock, in a ring one longer than the window of 10 s.

    The second at the window's far end is taken in part, by as much of it as the window still covers, so that the figure
    neither jumps nor lags with the turn of the second.
    """

    __slots__ = ("_counts", "_second")

    def __init__(self) -> None:
        self._counts = [0] * (_WINDOW_SECONDS + 1)
        self._second = 0

    def add(self, count: int, now: float) -> None:
        """Counts events at `now`, seconds of a clock that never falls."""
        self._turn(int(now))
        self._counts[self._second % len(self._counts)] += count

    def per_second(self, now: float) -> float:
        """Returns the mean over the 10 s before `now`."""
        self._turn(int(now))
        oldest = self._counts[(self._second + 1) % len(self._counts)]
        return (sum(self._counts) - oldest * (now - self._second)) / _WINDOW_SECONDS

    def _turn(self, second: int) -> None:
        for passed in range(self._second + 1, min(second, self._second + len(self._counts)) + 1):
            self._counts[passed % len(self._counts)] = 0
        if second > self._second + len(self._counts):
            self._counts = [0] * len(self._counts)
        self._second = max(self._second, second)
