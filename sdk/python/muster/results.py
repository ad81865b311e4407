"""What comes of work: outcomes, products, and what the service does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum

from muster import values
from muster.allocator.v1 import work_pb2
from muster.calls import item_error
from muster.errors import MusterError
from muster.values import Setting


class WorkOutcome(IntEnum):
    """How a unit of work ended."""

    UNSPECIFIED = 0
    SUCCEEDED = 1
    FAILED = 2
    BLOCKED = 3


class ResultDisposition(IntEnum):
    """What was done with a result: it counts, it counts although late, or it is kept for an operator to decide."""

    UNSPECIFIED = 0
    RECORDED = 1
    RECORDED_LATE = 2
    QUARANTINED = 3


class ExitSignal(IntEnum):
    """What a run says of its exit towards the target; each kind has a cool-down of its own.

    RATE_LIMITED: 429. BLOCKED: 403, a captcha, a ban. TRANSPORT_ERROR: the exit did not carry the connection.
    UNSPECIFIED: BLOCKED for the outcome BLOCKED, else nothing.
    """

    UNSPECIFIED = 0
    RATE_LIMITED = 1
    BLOCKED = 2
    TRANSPORT_ERROR = 3


@dataclass(frozen=True, slots=True)
class Lease:
    """Names a lease and proves that the caller holds it."""

    allocation_key: str
    lease_token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Product:
    """One thing found.

    Attributes:
        product_id: Its id at the target, 1 to 256 characters.
        title: Up to 1024 characters.
        url: Up to 2048 characters.
        rank: Its place in the listing, from 1; 0 when it has none.
        attributes: Anything else, up to 64 values.
    """

    product_id: str
    title: str = ""
    url: str = ""
    rank: int = 0
    attributes: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What came of one unit.

    Attributes:
        lease: The lease it was done under.
        outcome: How it ended.
        execution_time: How long it took, up to 24 h.
        block_type: What kind of block, 1 to 64 characters; only when blocked.
        products: What was found, up to 1000.
        applied_settings: The settings that were really applied.
        exit_ip: The address the target saw, if known.
        retry_after: How long the target asked to be left alone; None when it did not say.
        error_message: Up to 1024 characters.
        persona_used: Whether the persona was really used; its counters move only then.
        exit_signal: What the run says of its exit.
        crawl_delay: The delay between requests that the target asks for, up to 1 h; None when it did not say.
    """

    lease: Lease
    outcome: WorkOutcome
    execution_time: timedelta
    block_type: str = ""
    products: Sequence[Product] = ()
    applied_settings: Mapping[str, Setting] = field(default_factory=dict)
    exit_ip: str = ""
    retry_after: timedelta | None = None
    error_message: str = ""
    persona_used: bool = False
    exit_signal: ExitSignal = ExitSignal.UNSPECIFIED
    crawl_delay: timedelta | None = None


@dataclass(frozen=True, slots=True)
class SubmittedResult:
    """The answer to one result: what was done with it and when, or why it was refused."""

    allocation_key: str
    disposition: ResultDisposition
    recorded_at: datetime | None
    error: MusterError | None


def lease_message(lease: Lease) -> work_pb2.Lease:
    """Returns a lease as a message."""
    return work_pb2.Lease(allocation_key=lease.allocation_key, lease_token=lease.lease_token)


def result_message(result: WorkResult) -> work_pb2.WorkResult:
    """Returns a result as a message."""
    return work_pb2.WorkResult(
        lease=lease_message(result.lease),
        outcome=work_pb2.WorkOutcome.ValueType(result.outcome),
        block_type=result.block_type,
        execution_time=values.duration(result.execution_time),
        applied_settings=values.setting_values(result.applied_settings),
        exit_ip=result.exit_ip,
        products=[
            work_pb2.Product(
                product_id=product.product_id,
                title=product.title,
                url=product.url,
                rank=product.rank,
                attributes=values.setting_values(product.attributes),
            )
            for product in result.products
        ],
        retry_after=values.duration(result.retry_after),
        error_message=result.error_message,
        persona_used=result.persona_used,
        exit_signal=work_pb2.ExitSignal.ValueType(result.exit_signal),
        crawl_delay=values.duration(result.crawl_delay),
    )


def submitted(message: work_pb2.SubmittedResult) -> SubmittedResult:
    """Returns the answer to one result."""
    return SubmittedResult(
        message.allocation_key,
        values.member(ResultDisposition, message.disposition),
        values.moment(message, "recorded_at"),
        item_error(message.error) if message.HasField("error") else None,
    )
