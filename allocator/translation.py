"""Between the contract's messages and the domain: what several servicers need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from muster.allocator.v1 import slot_pb2, work_pb2

from allocator.acts import Act
from allocator.audit import Deed
from allocator.blockers import NoWork
from allocator.clients import ClientIdentity
from allocator.leases import LeaseName
from allocator.slots import Setting, Tracking
from services import requests
from services.call import Principal
from services.errors import DomainError, InvalidField
from services.status import Context, code_number
from services.validate import Checks

_MAX_SETTINGS = 64
_SETTING_NAME = 64
_SETTING_TEXT = 4096
_PEER = re.compile(r"ipv[46]:\[?(?P<address>[0-9a-fA-F:.]+?)(%\w+)?\]?:\d+\Z")


def moment(value: datetime | None) -> Timestamp | None:
    """Returns a Timestamp, None for None."""
    if value is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


def item_error(error: DomainError) -> work_pb2.ItemError:
    """Returns the refusal of one item of a batch."""
    refusal = work_pb2.ItemError(
        code=code_number(error.reason), reason=error.reason, message=error.message, metadata=error.metadata
    )
    if error.retry_after_seconds is not None:
        refusal.retry_after.FromNanoseconds(int(error.retry_after_seconds * 1e9))
    return refusal


def deed_of(principal: Principal, action: str, request: Message, reason: str = "") -> Deed:
    """Returns who does what, for the audit entry; '' when the method takes no reason."""
    return Deed(principal.key_id, action, reason, requests.digest(request))


def act_of(checks: Checks, request: Any, principal: Principal, action: str) -> Act:
    """Checks the required field `act` of a request."""
    if not request.HasField("act"):
        checks.fail("act", "required")
    reason = checks.text("act.reason", request.act.reason, min_length=1, max_length=256)
    return Act(
        request_id=checks.uuid("act.request_id", request.act.request_id),
        deed=deed_of(principal, action, request, reason),
        dry_run=request.act.dry_run,
    )


def client_identity(checks: Checks, owner: Any, context: Context) -> ClientIdentity:
    """Checks the required field `client` of a request; the peer's address stands in for a missing one."""
    if not owner.HasField("client"):
        checks.fail("client", "required")
    client: work_pb2.ClientIdentity = owner.client
    said = (
        client.client_id,
        client.client_name,
        client.instance_number,
        client.user_folder_number,
        client.client_ip or context.peer() or "",
    )
    try:
        return _checked_identity(*said, bool(client.client_ip))
    except InvalidField as error:
        for violation in error.violations:
            checks.fail(violation.field, violation.rule)
        return ClientIdentity(*said)


# The same machines call all the time.
@lru_cache(maxsize=16_384)
def _checked_identity(
    client_id: str, client_name: str, instance_number: int, user_folder_number: int, address: str, is_said: bool
) -> ClientIdentity:
    checks = Checks()
    if is_said:
        address = checks.address("client.client_ip", address)
    else:
        address = peer["address"] if (peer := _PEER.match(address)) else ""
    identity = ClientIdentity(
        client_id=checks.identifier("client.client_id", client_id),
        client_name=checks.text("client.client_name", client_name, max_length=128),
        instance_number=checks.number("client.instance_number", instance_number, least=0, most=65535),
        user_folder_number=checks.number("client.user_folder_number", user_folder_number, least=0, most=65535),
        client_ip=address,
    )
    checks.done()
    return identity


def no_work_message(no_work: NoWork) -> work_pb2.NoWork:
    """Returns why nothing is handed out."""
    retry_after = Duration()
    retry_after.FromMilliseconds(int(no_work.retry_after_seconds * 1000))
    return work_pb2.NoWork(
        blocker=work_pb2.BlockerKind.ValueType(no_work.blocker), message=no_work.message, retry_after=retry_after
    )


def lease_name(checks: Checks, path: str, lease: work_pb2.Lease) -> LeaseName:
    """Checks a lease's key and token."""
    key = checks.uuid(f"{path}.allocation_key", lease.allocation_key)
    token = checks.token(f"{path}.lease_token", lease.lease_token)
    return LeaseName(key, UUID(bytes=token) if len(token) == 16 else UUID(int=0))


def settings(checks: Checks, field: str, values: Mapping[str, work_pb2.SettingValue]) -> dict[str, Setting]:
    """Checks up to 64 opaque values with names of 1 to 64 characters."""
    checks.count(field, values, least=0, most=_MAX_SETTINGS)
    found: dict[str, Setting] = {}
    for name in sorted(values):
        value = values[name]
        checks.text(f"{field} (name)", name, min_length=1, max_length=_SETTING_NAME)
        kind = value.WhichOneof("kind")
        path = f"{field}[{name[:_SETTING_NAME]}]"
        if kind is None:
            checks.fail(path, "required: a value")
        elif kind == "double_value":
            found[name] = checks.finite(path, value.double_value)
        elif kind == "string_value":
            found[name] = checks.text(path, value.string_value, max_length=_SETTING_TEXT)
        else:
            found[name] = getattr(value, kind)
    return found


def setting_message(value: Setting) -> work_pb2.SettingValue:
    """Returns a value with its type."""
    if isinstance(value, bool):
        return work_pb2.SettingValue(bool_value=value)
    if isinstance(value, int):
        return work_pb2.SettingValue(int_value=value)
    if isinstance(value, float):
        return work_pb2.SettingValue(double_value=value)
    return work_pb2.SettingValue(string_value=value)


def settings_message(values: Mapping[str, Setting]) -> dict[str, work_pb2.SettingValue]:
    """Returns values with their types, for a map field."""
    return {name: setting_message(value) for name, value in values.items()}


def tracking_message(tracking: Tracking | None) -> slot_pb2.DailyTracking | None:
    """Returns one slot's day, None for None."""
    if tracking is None:
        return None
    return slot_pb2.DailyTracking(
        work_date=tracking.work_date.isoformat(),
        quota=_uint32(tracking.quota),
        allocated=_uint32(tracking.allocated),
        succeeded=_uint32(tracking.succeeded),
        failed=_uint32(tracking.failed),
        blocked=_uint32(tracking.blocked),
        expired=_uint32(tracking.expired),
        released=_uint32(tracking.released),
    )


def day_text(day: date | None) -> str:
    """Returns `YYYY-MM-DD`, '' for None."""
    return day.isoformat() if day else ""


def _uint32(value: int) -> int:
    # The totals of thousands of slots at their greatest quota could pass it.
    return min(value, 2**32 - 1)
