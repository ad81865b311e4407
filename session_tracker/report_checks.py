"""The checks of reports: all of a batch before any of it is taken, at the price of a glance where nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muster.session_tracker.v1 import session_pb2

from services.validate import Checks
from session_tracker.intake import Handles
from session_tracker.messages import (
    REASON_CHARACTERS,
    SESSION_ID_CHARACTERS,
    STAGE_CHARACTERS,
    check_session_id,
)
from session_tracker.sessions import REPORTED_STATES, RUNNING

MAX_UPDATES = 1000
_MAX_NAMES = 1000
_MAX_STREAM_NAMES = 100_000
_MAX_CLASSES = 16
_CLASS_CHARACTERS = 64
_MAX_LAST_ERRORS = 10
_ERROR_CHARACTERS = 256
_STATES = "RUNNING, PAUSED, RATE_LIMITED, or unspecified"
_ALL_RUNNING = [RUNNING] * MAX_UPDATES


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed updates as lists of the same length."""

    handle: Sequence[int]
    sequence: Sequence[int]
    current_page: Sequence[int]
    total_pages: Sequence[int]
    products_found: Sequence[int]
    errors_count: Sequence[int]
    state: Sequence[int]


def check_update(checks: Checks, update: session_pb2.ProgressUpdate, path: str) -> None:
    """Checks one report; `path` is its place in the request, with a dot at its end."""
    check_session_id(checks, update.session_id, f"{path}session_id")
    if update.sequence == 0:
        checks.fail(f"{path}sequence", "required: from 1")
    checks.choice(f"{path}state", update.state, REPORTED_STATES, _STATES)
    checks.text(f"{path}stage", update.stage, max_length=STAGE_CHARACTERS)
    checks.text(f"{path}reason", update.reason, max_length=REASON_CHARACTERS)
    classes = update.errors_by_class
    checks.count(f"{path}errors_by_class", classes, least=0, most=_MAX_CLASSES)
    for index, counted in enumerate(classes[:_MAX_CLASSES]):
        field = f"{path}errors_by_class[{index}].error_class"
        checks.text(field, counted.error_class, min_length=1, max_length=_CLASS_CHARACTERS)
    checks.unique(f"{path}errors_by_class", [counted.error_class for counted in classes[:_MAX_CLASSES]])
    checks.count(f"{path}last_errors", update.last_errors, least=0, most=_MAX_LAST_ERRORS)
    for index, error in enumerate(update.last_errors[:_MAX_LAST_ERRORS]):
        field = f"{path}last_errors[{index}]."
        checks.moment(error, "at", required=True, path=f"{field}at")
        checks.text(f"{field}error_class", error.error_class, min_length=1, max_length=_CLASS_CHARACTERS)
        checks.text(f"{field}message", error.message, max_length=_ERROR_CHARACTERS)


def check_updates(updates: Sequence[session_pb2.ProgressUpdate], *, least: int = 1, most: int = MAX_UPDATES) -> None:
    """Checks a list of updates before any of it is taken.

    The first pass only tells what is surely right, at a sixth of the price; `Checks` has the last word on the rest.

    Raises:
        InvalidField: names every field that is wrong.
    """
    if least <= len(updates) <= most:
        for update in updates:
            if (
                update.state not in REPORTED_STATES
                or not update.sequence
                or len(stage := update.stage) > STAGE_CHARACTERS
                or not stage.isprintable()
                or not 0 < len(name := update.session_id) <= SESSION_ID_CHARACTERS
                or not name.isprintable()
                or update.reason
                or update.errors_by_class
                or update.last_errors
            ):
                break
        else:
            return
    checks = Checks()
    checks.count("updates", updates, least=least, most=most)
    checks.done()
    for index, update in enumerate(updates):
        check_update(checks, update, f"updates[{index}].")
        # The first malformed update says it all; a thousand would not fit into a call's trailers.
        checks.done()


def check_batch(request: session_pb2.ReportStreamRequest, handles: Handles) -> Packed | None:
    """Checks a batch of a stream, and returns its packed updates, if it has any.

    Raises:
        InvalidField: names what is wrong.
    """
    checks = Checks()
    if request.batch <= 0:
        checks.fail("batch", "required: from 1, growing")
    updates = request.updates
    packed = request.packed
    handle = packed.handle[:] if request.HasField("packed") else []
    size = len(updates) + len(handle)
    if not 0 < size <= MAX_UPDATES:
        # What carries names alone is no batch of updates either.
        field = "packed.handle" if handle else "updates"
        checks.fail(field, f"with updates and packed together must have 1 to {MAX_UPDATES} entries, has {size}")
    checks.done()
    if updates:
        check_updates(updates)
    if request.names:
        _check_names(checks, request.names, handles)
        checks.done()
    if not handle:
        if packed.ByteSize():
            checks.fail("packed.handle", "required with any other array")
            checks.done()
        return None
    return _check_packed(checks, packed, handle, len(handles) + len(request.names))


def _check_names(checks: Checks, names: Sequence[str], handles: Handles) -> None:
    checks.count("names", names, least=0, most=_MAX_NAMES)
    if len(handles) + len(names) > _MAX_STREAM_NAMES:
        checks.fail("names", f"at most {_MAX_STREAM_NAMES} on one stream: open another one")
    checks.done()
    for index, name in enumerate(names):
        if not 0 < len(name) <= SESSION_ID_CHARACTERS or not name.isprintable():
            check_session_id(checks, name, f"names[{index}]")
            checks.done()


def _check_packed(checks: Checks, packed: session_pb2.PackedUpdates, handle: Sequence[int], named: int) -> Packed:
    size = len(handle)
    sequence = packed.sequence[:]
    arrays = {
        "current_page": packed.current_page[:],
        "total_pages": packed.total_pages[:],
        "products_found": packed.products_found[:],
        "errors_count": packed.errors_count[:],
    }
    state: Sequence[int] = packed.state[:]
    if len(sequence) != size:
        checks.fail("packed.sequence", f"must be as long as handle, {size} entries, has {len(sequence)}")
    elif min(sequence) < 1:
        checks.fail(f"packed.sequence[{sequence.index(0)}]", "required: from 1")
    for field, array in arrays.items():
        if array and len(array) != size:
            checks.fail(f"packed.{field}", f"must be empty or as long as handle, {size} entries, has {len(array)}")
    if not state:
        state = _ALL_RUNNING[:size]
    elif len(state) != size:
        checks.fail("packed.state", f"must be empty or as long as handle, {size} entries, has {len(state)}")
    elif not REPORTED_STATES.issuperset(state):
        index = next(index for index, value in enumerate(state) if value not in REPORTED_STATES)
        checks.choice(f"packed.state[{index}]", state[index], REPORTED_STATES, _STATES)
    if max(handle) >= named:
        index = next(index for index, value in enumerate(handle) if value >= named)
        checks.fail(f"packed.handle[{index}]", f"must be below the {named} names of this stream, is {handle[index]}")
    elif len(set(handle)) != size:
        checks.unique("packed.handle", handle)
    checks.done()
    return Packed(handle=handle, sequence=sequence, state=state, **arrays)
