"""Between the contract's results and the domain's: what SubmitResults is told and answers."""

from __future__ import annotations

from collections.abc import Sequence

from muster.allocator.v1 import work_pb2

from allocator.clients import ClientIdentity
from allocator.exit_health import Signal
from allocator.leases import Status
from allocator.results import Answer, Product, Submission
from allocator.translation import item_error, lease_name, moment, settings
from services.errors import DomainError
from services.validate import Checks

MOST_RESULTS = 256
_MOST_PRODUCTS = 1000
_MOST_BYTES = 4 * 2**20
# The tag of SubmittedResult.allocation_key, and the length of a UUID's text.
_KEY = bytes((1 << 3 | 2, 36))
_DAY_SECONDS = 86400.0
_HOUR_SECONDS = 3600.0

_OUTCOMES: dict[int, Status] = {
    work_pb2.WORK_OUTCOME_SUCCEEDED: Status.SUCCEEDED,
    work_pb2.WORK_OUTCOME_FAILED: Status.FAILED,
    work_pb2.WORK_OUTCOME_BLOCKED: Status.BLOCKED,
}
_SIGNALS: dict[int, Signal] = {
    work_pb2.EXIT_SIGNAL_RATE_LIMITED: Signal.RATE_LIMITED,
    work_pb2.EXIT_SIGNAL_BLOCKED: Signal.BLOCKED,
    work_pb2.EXIT_SIGNAL_TRANSPORT_ERROR: Signal.TRANSPORT,
}


def submissions(checks: Checks, request: work_pb2.SubmitResultsRequest, client: ClientIdentity) -> list[Submission]:
    """Checks the results of a request; to be used only after `checks.done`."""
    checks.count("results", request.results, least=1, most=MOST_RESULTS)
    if (size := request.ByteSize()) > _MOST_BYTES:
        checks.fail("results", f"at most {_MOST_BYTES} bytes in all, is {size}")
    return [
        _submission(checks, f"results[{number}]", result, client)
        for number, result in enumerate(request.results[:MOST_RESULTS])
    ]


def answers(given: Sequence[Submission], answered: Sequence[Answer]) -> list[work_pb2.SubmittedResult]:
    """Returns what is answered to each result."""
    # Nearly all results of a batch share one acknowledgement. A message is the sum of its parts, so what they share is
    # made once: half the cost of setting each field anew.
    shared: dict[int, bytes] = {}
    messages = []
    for submission, answer in zip(given, answered, strict=True):
        key = str(submission.name.key)
        if isinstance(answer, DomainError):
            messages.append(work_pb2.SubmittedResult(allocation_key=key, error=item_error(answer)))
            continue
        part = shared.get(id(answer))
        if part is None:
            part = shared[id(answer)] = work_pb2.SubmittedResult(
                disposition=work_pb2.ResultDisposition.ValueType(answer.disposition),
                recorded_at=moment(answer.recorded_at),
            ).SerializeToString()
        messages.append(work_pb2.SubmittedResult.FromString(_KEY + key.encode() + part))
    return messages


def _submission(checks: Checks, path: str, result: work_pb2.WorkResult, client: ClientIdentity) -> Submission:
    # Most results leave most fields empty, and an empty one needs no check: with them a result takes twice as long.
    if not result.HasField("lease"):
        checks.fail(f"{path}.lease", "required")
    outcome = result.outcome
    status = _OUTCOMES.get(outcome)
    if status is None:
        checks.choice(f"{path}.outcome", outcome, _OUTCOMES, "SUCCEEDED, FAILED, BLOCKED")
        status = Status.FAILED
    blocked = status is Status.BLOCKED
    block_type = result.block_type
    if blocked:
        checks.text(f"{path}.block_type", block_type, min_length=1, max_length=64)
    elif block_type:
        checks.fail(f"{path}.block_type", "must be empty unless the outcome is BLOCKED")
    signal = Signal.BLOCKED if blocked else None
    if result.exit_signal:
        checks.choice(f"{path}.exit_signal", result.exit_signal, _SIGNALS, "RATE_LIMITED, BLOCKED, TRANSPORT_ERROR")
        signal = _SIGNALS.get(result.exit_signal)
    seconds = checks.duration(
        result, "execution_time", least=0, most=_DAY_SECONDS, required=True, path=f"{path}.execution_time"
    )
    retry_after = crawl_delay = None
    if result.HasField("retry_after"):
        retry_after = checks.duration(result, "retry_after", least=0, most=_DAY_SECONDS, path=f"{path}.retry_after")
    if result.HasField("crawl_delay"):
        crawl_delay = checks.duration(result, "crawl_delay", least=0, most=_HOUR_SECONDS, path=f"{path}.crawl_delay")
    if exit_ip := result.exit_ip:
        exit_ip = checks.address(f"{path}.exit_ip", exit_ip)
    if error_message := result.error_message:
        checks.text(f"{path}.error_message", error_message, max_length=1024)
    return Submission(
        lease_name(checks, f"{path}.lease", result.lease),
        client,
        status,
        block_type,
        _milliseconds(seconds) or 0,
        settings(checks, f"{path}.applied_settings", result.applied_settings) if result.applied_settings else {},
        exit_ip,
        _products(checks, path, result) if result.products else (),
        _milliseconds(retry_after),
        error_message,
        result.persona_used,
        signal,
        _milliseconds(crawl_delay),
    )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _products(checks: Checks, path: str, result: work_pb2.WorkResult) -> tuple[Product, ...]:
    checks.count(f"{path}.products", result.products, least=0, most=_MOST_PRODUCTS)
    products = []
    for number, product in enumerate(result.products[:_MOST_PRODUCTS]):
        where = f"{path}.products[{number}]"
        products.append(
            Product(
                product_id=checks.text(f"{where}.product_id", product.product_id, min_length=1, max_length=256),
                title=checks.text(f"{where}.title", product.title, max_length=1024),
                url=checks.text(f"{where}.url", product.url, max_length=2048),
                rank=product.rank,
                attributes=settings(checks, f"{where}.attributes", product.attributes),
            )
        )
    return tuple(products)
