"""Every reason of the contract becomes a typed error of its code's class, and enums agree with the contract."""

from datetime import timedelta
from enum import IntEnum
from importlib import import_module

import muster
import pytest
from muster import archives, errors, exits, insight, personas, reports, results, slot_specs, values, work
from muster.allocator.v1 import exit_pb2, insight_pb2, slot_pb2, work_pb2
from muster.archiver.v1 import archive_pb2
from muster.calls import item_error, may_repeat, pause_seconds
from muster.persona_store.v1 import checkout_pb2, persona_pb2
from muster.session_tracker.v1 import session_pb2

from services.status import code_number, code_of, reasons


@pytest.mark.parametrize("reason", sorted(reasons()))
def test_every_reason_is_restored_under_its_code(reason: str) -> None:
    code = code_of(reason).name
    error = errors.restore(code, reason, "words", metadata={"slot_id": "7"})
    assert isinstance(error, errors.restore(code, "", "").__class__)
    assert type(error) is not errors.MusterError
    assert (error.code, error.reason, error.message, error.metadata) == (code, reason, "words", {"slot_id": "7"})
    assert str(error) == f"{reason}: words"


def test_reasons_named_in_the_client_are_the_contracts() -> None:
    assert set(errors._BY_REASON) <= reasons()


def test_an_unknown_reason_is_known_by_its_code_and_an_unknown_code_is_still_an_error() -> None:
    assert type(errors.restore("NOT_FOUND", "MADE_LATER", "")) is errors.NotFound
    assert type(errors.restore("CODE_OF_LATER", "LEASE_LOST", "")) is errors.LeaseLost
    assert type(errors.restore("CODE_OF_LATER", "", "")) is errors.MusterError


def test_a_reason_under_another_code_than_the_contracts_is_not_believed() -> None:
    assert type(errors.restore("UNAVAILABLE", "LEASE_LOST", "")) is errors.Unavailable


def test_the_error_of_an_item_is_as_typed_as_that_of_a_call() -> None:
    message = work_pb2.ItemError(code=code_number("LEASE_LOST"), reason="LEASE_LOST", message="ran out")
    message.metadata["status"] = "expired"
    error = item_error(message)
    assert type(error) is errors.LeaseLost
    assert error.metadata == {"status": "expired"}
    assert type(item_error(work_pb2.ItemError(code=99))) is errors.ServiceFault


def test_the_error_of_an_item_tells_when_to_come_again_where_its_contract_does() -> None:
    wait = timedelta(seconds=0.25)
    overloaded = work_pb2.ItemError(code=code_number("OVERLOADED"), reason="OVERLOADED")
    assert not may_repeat(item_error(overloaded), idempotent=True)
    overloaded.retry_after.FromTimedelta(wait)
    error = item_error(overloaded)
    assert error.retry_after == wait
    assert may_repeat(error, idempotent=True)
    assert item_error(checkout_pb2.ItemError(code=code_number("OVERLOADED"))).retry_after is None


@pytest.mark.parametrize(
    ("enum", "contract"),
    [
        (work.BlockerKind, work_pb2.BlockerKind),
        (results.WorkOutcome, work_pb2.WorkOutcome),
        (results.ResultDisposition, work_pb2.ResultDisposition),
        (results.ExitSignal, work_pb2.ExitSignal),
        (slot_specs.Pacing, slot_pb2.Pacing),
        (exits.ExitCapMode, exit_pb2.ExitCapMode),
        (insight.AllocationStatus, insight_pb2.AllocationStatus),
        (personas.PersonaStatus, persona_pb2.PersonaStatus),
        (personas.CheckOutMode, checkout_pb2.CheckOutMode),
        (personas.UseOutcome, checkout_pb2.UseOutcome),
        (reports.SessionState, session_pb2.SessionState),
        (reports.UpdateVerdict, session_pb2.UpdateVerdict),
        (reports.CommandKind, session_pb2.CommandKind),
        (archives.PartitionInterval, archive_pb2.PartitionInterval),
        (archives.ArchiveStep, archive_pb2.ArchiveStep),
        (archives.RunState, archive_pb2.RunState),
    ],
)
def test_enums_are_the_contracts(enum: type[IntEnum], contract: object) -> None:
    prefix = contract.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")  # type: ignore[attr-defined]
    theirs = {name.removeprefix(prefix): number for name, number in contract.items()}  # type: ignore[attr-defined]
    assert {member.name: member.value for member in enum} == theirs
    assert values.member(enum, 9999) is enum(0)


def test_settings_keep_their_types_there_and_back() -> None:
    settings: dict[str, values.Setting] = {"on": True, "count": -(2**63), "pace": 0.5, "locale": "ko", "none": 0}
    there = values.setting_values(settings)
    back = values.plain_settings(there)
    assert back == settings
    assert {name: type(value) for name, value in back.items()} == {
        name: type(value) for name, value in settings.items()
    }


@pytest.mark.parametrize("wrong", [2**63, float("nan"), float("inf"), None, ["list"], b"bytes"])
def test_settings_of_other_kinds_are_refused_by_name(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match="'odd'"):
        values.setting_values({"odd": wrong})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("reason", "retry_after", "safe", "once"),
    [
        ("DRAINING", 0.1, True, True),
        ("", None, True, False),
        ("OVERLOADED", 0.1, True, True),
        ("EXIT_LIMIT_REACHED", None, False, False),
        ("DEADLINE_TOO_SHORT", None, True, False),
        ("STALE_VERSION", None, False, False),
        ("RUN_IN_PROGRESS", 1.0, False, False),
        ("INVALID_FIELD", None, False, False),
        ("INVALID_API_KEY", None, False, False),
        ("INTERNAL_FAULT", None, False, False),
        ("LEASE_LOST", None, False, False),
    ],
)
def test_what_is_repeated(reason: str, retry_after: float | None, safe: bool, once: bool) -> None:
    code = code_of(reason).name if reason else "UNAVAILABLE"
    delay = timedelta(seconds=retry_after) if retry_after else None
    error = errors.restore(code, reason, "", retry_after=delay)
    assert may_repeat(error, idempotent=True) is safe
    assert may_repeat(error, idempotent=False) is once


def test_the_pause_is_what_the_service_says_or_grows_with_full_jitter() -> None:
    told = errors.restore("UNAVAILABLE", "DRAINING", "", retry_after=timedelta(seconds=2))
    assert all(2 <= pause_seconds(told, attempt) <= 2.2 for attempt in range(1, 50))
    plain = errors.restore("UNAVAILABLE", "", "")
    for attempt, most in ((1, 0.1), (2, 0.2), (4, 0.8), (30, 5.0), (5000, 5.0)):
        pauses = [pause_seconds(plain, attempt) for _ in range(200)]
        assert min(pauses) >= 0
        assert most / 2 < max(pauses) <= most


def test_every_public_name_is_there_and_others_are_not() -> None:
    for name in muster.__all__:
        assert getattr(muster, name) is getattr(import_module(getattr(muster, name).__module__), name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        muster.Nothing  # noqa: B018
