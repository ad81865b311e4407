"""Between the contract's results and the domain's: what SubmitResults is told and answers."""

from __future__ import annotations

from collections.abc import Sequence

from asyncpg.pgproto import pgproto
from muster.allocator.v1 import work_pb2

from allocator.clients import ClientIdentity
from allocator.exit_health import Signal
from allocator.leases import LeaseName, Status
from allocator.results import Answer, Product, Submission
from allocator.translation import item_error, lease_name, moment, settings
from services.errors import DomainError
from services.validate import Checks
from services.varints import varint

MOST_RESULTS = 256
_MOST_PRODUCTS = 1000
_MOST_BYTES = 4 * 2**20
# The tags of SubmitResultsResponse.results and of SubmittedResult.allocation_key, and the length of a UUID's text.
_RESULTS = bytes((1 << 3 | 2,))
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


def submissions(
    checks: Checks, request: work_pb2.SubmitResultsRequest, client: ClientIdentity
) -> tuple[list[Submission], int]:
    """Checks the results of a request; returns them, to be used only after `checks.done`, and the request's bytes."""
    checks.count("results", request.results, least=1, most=MOST_RESULTS)
    if (size := request.ByteSize()) > _MOST_BYTES:
        checks.fail("results", f"at most {_MOST_BYTES} bytes in all, is {size}")
    results = request.results[:MOST_RESULTS]
    return [_submission(checks, number, result, client) for number, result in enumerate(results)], size


def answers_bytes(given: Sequence[Submission], answered: Sequence[Answer]) -> bytes:
    """Returns what is answered to each result: a SubmitResultsResponse, encoded."""
    # Nearly all results of a batch share one acknowledgement. A message is the sum of its parts, so what they share is
    # made once: a fifth of the cost of setting each field anew.
    shared: dict[int, tuple[bytes, bytes]] = {}
    parts: list[bytes] = []
    for submission, answer in zip(given, answered, strict=True):
        around = shared.get(id(answer))
        if around is None:
            around = shared[id(answer)] = _around_key(answer)
        before, after = around
        parts += (before, str(submission.name.key).encode(), after)
    return b"".join(parts)


def _around_key(answer: Answer) -> tuple[bytes, bytes]:
    if isinstance(answer, DomainError):
        message = work_pb2.SubmittedResult(error=item_error(answer))
    else:
        message = work_pb2.SubmittedResult(
            disposition=work_pb2.ResultDisposition.ValueType(answer.disposition),
            recorded_at=moment(answer.recorded_at),
        )
    after = message.SerializeToString()
    return _RESULTS + varint(len(_KEY) + 36 + len(after)) + _KEY, after


def _submission(checks: Checks, number: int, result: work_pb2.WorkResult, client: ClientIdentity) -> Submission:
    # Most results leave most fields empty, and an empty one needs no check: with them a result takes twice as long.
    path = f"results[{number}]"
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
    time = result.execution_time
    seconds: float | None = time.seconds + time.nanos / 1e9
    if not (seconds and 0 < seconds <= _DAY_SECONDS):
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
        _lease_name(checks, path, result),
        client,
        status,
        block_type,
        round((seconds or 0) * 1000),
        settings(checks, f"{path}.applied_settings", result.applied_settings) if result.applied_settings else {},
        exit_ip,
        _products(checks, path, result) if result.products else (),
        None if retry_after is None else round(retry_after * 1000),
        error_message,
        result.persona_used,
        signal,
        None if crawl_delay is None else round(crawl_delay * 1000),
    )


def _lease_name(checks: Checks, path: str, result: work_pb2.WorkResult) -> LeaseName:
    lease = result.lease
    key, token = lease.allocation_key, lease.lease_token
    if len(key) == 36 and len(token) == 16:
        try:
            # Of the kind that the database's rows hold: a uuid.UUID, made in a tenth of the time.
            return LeaseName(pgproto.UUID(key), pgproto.UUID(token))
        except ValueError:
            pass
    if not result.HasField("lease"):
        checks.fail(f"{path}.lease", "required")
    return lease_name(checks, f"{path}.lease", lease)


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
