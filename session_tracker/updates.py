"""A report as the domain reads it: the contract's message is one as it is, uncopied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class CountedErrors(Protocol):
    """Errors of one class, as reported."""

    @property
    def error_class(self) -> str:
        """In the worker's words."""

    @property
    def count(self) -> int:
        """So far."""


class Moment(Protocol):
    """A moment, as reported."""

    @property
    def seconds(self) -> int:
        """Since 1970."""

    @property
    def nanos(self) -> int:
        """And nanoseconds."""


class ReportedError(Protocol):
    """One error, as reported."""

    @property
    def at(self) -> Moment:
        """By the worker's clock."""

    @property
    def error_class(self) -> str:
        """In the worker's words."""

    @property
    def message(self) -> str:
        """In words."""

    @property
    def page(self) -> int:
        """0 when none."""


class Update(Protocol):
    """One report of one session, in absolute values. The contract's message is one as it is, uncopied."""

    @property
    def session_id(self) -> str:
        """Which session."""

    @property
    def sequence(self) -> int:
        """Above that of the session's last report, or the update changes nothing."""

    @property
    def state(self) -> int:
        """One of `REPORTED_STATES`."""

    @property
    def stage(self) -> str:
        """Empty keeps it."""

    @property
    def current_page(self) -> int:
        """Pages done."""

    @property
    def total_pages(self) -> int:
        """Pages to do; 0 when unknown."""

    @property
    def products_found(self) -> int:
        """Products found."""

    @property
    def errors_count(self) -> int:
        """Errors met."""

    @property
    def reason(self) -> str:
        """Why it is in this state; empty keeps it while the state stays."""

    @property
    def errors_by_class(self) -> Iterable[CountedErrors]:
        """Empty keeps what stands."""

    @property
    def last_errors(self) -> Iterable[ReportedError]:
        """Oldest first; empty keeps what stands."""

    @property
    def acknowledged_command(self) -> int:
        """The last command that was carried out; 0 for none."""
