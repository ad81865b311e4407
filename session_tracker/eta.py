"""When a session will be done: by the mean pace of its last pages in this stage, with an interval around it.

The method `pace`: with m the mean and v the variance of the seconds per page, the newest page weighing a fifth, the R
pages left take R·m. Their own scatter adds R·v to its variance, and that m is known from some nine pages only (the
weight of such a mean is spread over (2 - 1/5) : 1/5 of them) adds R²·v/n. A 90 % interval is 1.645 deviations wide on
either side. It is the pace's interval: it does not know of blocks, pauses or a total that grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from session_tracker.sessions import RUNNING, Session

METHOD = "pace"

# A new page counts for a fifth: the mean follows a change of pace within some ten pages.
_NEWEST_WEIGHT = 0.2
_KEPT_WEIGHT = 1.0 - _NEWEST_WEIGHT
# Below this many pages a mean says little.
_LEAST_PAGES = 3
_ENOUGH_PAGES = 100
_EFFECTIVE_PAGES = (2.0 - _NEWEST_WEIGHT) / _NEWEST_WEIGHT
_DEVIATIONS = 1.645


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from now until a session is done, and a 90 % interval around them; none is below 0."""

    seconds: float
    low: float
    high: float


def measure(session: Session, pages: int, at: float) -> None:
    """Takes `pages` (at least 1) done until `at` into a session's pace."""
    each = (at - session.paged) / pages
    session.paged = at
    if session.measured == 0:
        session.interval = each
        session.variance = 0.0
    else:
        weight = _NEWEST_WEIGHT if pages == 1 else 1.0 - _KEPT_WEIGHT**pages
        off = each - session.interval
        session.interval += weight * off
        # The mean of so many pages scatters less than one of them by just as many times.
        session.variance = (1.0 - weight) * (session.variance + weight * off * off * pages)
    # No more than it takes to trust them: small numbers cost no memory.
    session.measured = min(session.measured + pages, _ENOUGH_PAGES)


def pages_per_second(session: Session) -> float:
    """Returns the session's own pace; 0 when it is not known."""
    if session.measured < _LEAST_PAGES or session.interval <= 0.0:
        return 0.0
    return 1.0 / session.interval


def forecast(session: Session, now: float) -> Forecast | None:
    """Returns how long the pages left will take at the mean pace of the last ones.

    None when the total is unknown, fewer than three pages were measured since the total or the stage last changed, or
    the session is not running: a pace says nothing about a pause.
    """
    if session.total_pages == 0 or session.measured < _LEAST_PAGES or session.state != RUNNING:
        return None
    left = max(0, session.total_pages - session.current_page)
    seconds = session.paged + left * session.interval - now
    known_from = min(float(session.measured), _EFFECTIVE_PAGES)
    either_side = _DEVIATIONS * math.sqrt(session.variance * (left + left * left / known_from))
    return Forecast(max(0.0, seconds), max(0.0, seconds - either_side), max(0.0, seconds + either_side))
