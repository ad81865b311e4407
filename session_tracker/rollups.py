"""Live figures of a slot or an organization, kept with each change instead of counted when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from session_tracker.rate import Rate
from session_tracker.sessions import LIVE_STATES, Session, State


@dataclass(frozen=True, slots=True)
class Totals:
    """Live figures, of a slot, an organization or all of them.

    Attributes:
        pages_per_second: Over the last 10 s, finished sessions included.
        results_committed: Final results since the process started.
        rebuilding: They may lack sessions that workers have yet to report again.
    """

    live: int
    by_state: dict[State, int]
    pages: int
    products: int
    errors: int
    pages_per_second: float
    results_committed: int
    rebuilding: bool


class Figures:
    """The figures of the live sessions of a slot or an organization."""

    __slots__ = ("by_state", "errors", "live", "pages", "products", "rate", "results_committed")

    def __init__(self) -> None:
        self.live = 0
        self.by_state = [0] * (max(State) + 1)
        self.pages = self.products = self.errors = 0
        self.rate = Rate()
        self.results_committed = 0

    def join(self, session: Session) -> None:
        """Counts a session with what stands of it as counted."""
        self.live += 1
        self.by_state[session.state] += 1
        self.pages += session.counted_page
        self.products += session.counted_products
        self.errors += session.counted_errors

    def leave(self, session: Session) -> None:
        """Undoes `join`."""
        self.live -= 1
        self.by_state[session.state] -= 1
        self.pages -= session.counted_page
        self.products -= session.counted_products
        self.errors -= session.counted_errors

    def totals(self, now: float, *, rebuilding: bool) -> Totals:
        """Returns the figures as they stand."""
        return Totals(
            live=self.live,
            by_state={state: self.by_state[state] for state in LIVE_STATES},
            pages=self.pages,
            products=self.products,
            errors=self.errors,
            pages_per_second=self.rate.per_second(now),
            results_committed=self.results_committed,
            rebuilding=rebuilding,
        )


def together(parts: Iterable[Totals]) -> Totals:
    """Returns the sum of some figures: organizations share no session."""
    live = pages = products = errors = results = 0
    by_state = dict.fromkeys(LIVE_STATES, 0)
    rate = 0.0
    rebuilding = False
    for part in parts:
        live += part.live
        pages += part.pages
        products += part.products
        errors += part.errors
        rate += part.pages_per_second
        results += part.results_committed
        rebuilding = rebuilding or part.rebuilding
        for state, count in part.by_state.items():
            by_state[state] += count
    return Totals(live, by_state, pages, products, errors, rate, results, rebuilding)
