"""When a lease has run out for a worker that reaches nobody."""

from datetime import UTC, date, datetime, timedelta

from muster.leases import HeldLease
from muster.results import Lease
from muster.work import Allocation

GRANTED = datetime(2026, 11, 30, tzinfo=UTC)
# On the loop's clock, when the lease was asked for.
ASKED = 1000.0


def held(*, reported: float | None = None, oldest_seconds: float = 7200.0) -> HeldLease:
    """A lease of 300 s, and when the tracker last took a report of it."""
    allocation = Allocation(
        lease=Lease("key", b"t" * 16),
        expires_at=GRANTED + timedelta(seconds=300),
        renewable_until=GRANTED + timedelta(seconds=oldest_seconds),
        lease_duration=timedelta(seconds=300),
        slot_id="s",
        work_date=date(2026, 11, 30),
        keyword="k",
        code="",
        target="",
        settings={},
        exit=None,
        persona=None,
        traceparent="",
    )
    return HeldLease(allocation, ASKED, lambda: reported)


def test_without_a_report_it_lasts_from_the_last_renewal() -> None:
    lease = held()
    assert lease.ends_at() == ASKED + 300
    lease.renewed(ASKED + 100, GRANTED + timedelta(seconds=401))
    assert lease.ends_at() == ASKED + 401


def test_a_report_that_was_taken_may_have_renewed_it_a_round_later() -> None:
    assert held(reported=ASKED + 290).ends_at() == ASKED + 290 + 30 + 300
    assert held(reported=ASKED - 60).ends_at() == ASKED + 300


def test_no_renewal_goes_past_its_greatest_age() -> None:
    assert held(reported=ASKED + 290, oldest_seconds=400).ends_at() == ASKED + 400
    lease = held(oldest_seconds=400)
    lease.aged()
    assert (lease.due_at(), lease.ends_at()) == (ASKED + 400,) * 2
