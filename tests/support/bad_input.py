"""What can be wrong with a field of a request by its kind, and which fields a request has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

ID = "123e4567-e89b-12d3-a456-426614174000"
Fault = tuple[str, Any]

# Messages that are one value, not a group of fields.
_VALUES = ("google.protobuf.Duration", "google.protobuf.Timestamp", "google.protobuf.FieldMask")


@dataclass(frozen=True, slots=True)
class BadCall:
    """A method, a request that is well formed, and what to spoil in it, by the path of the field."""

    method: str
    request: Any
    faults: list[Fault] = field(default_factory=list)


def seconds(value: float) -> Duration:
    """Returns a Duration."""
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def spoil(message: Any, path: str, value: Any) -> None:
    """Sets the field of a path; None clears it, a message is copied, a list replaced, a map filled up."""
    *parents, name = path.split(".")
    for parent in parents:
        message = message[int(parent)] if parent.isdigit() else getattr(message, parent)
    if value is None:
        message.ClearField(name)
    elif isinstance(value, list):
        message.ClearField(name)
        getattr(message, name).extend(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            getattr(message, name)[key].CopyFrom(entry)
    elif hasattr(value, "SerializeToString"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def leaves(descriptor: Descriptor, path: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """Yields every field of a request with its path, messages within messages too; `[]` stands for any element."""
    for one in descriptor.fields:
        here = f"{path}{one.name}"
        inner = one.message_type
        yield here, one
        if inner is not None and inner.full_name not in _VALUES and not inner.GetOptions().map_entry:
            yield from leaves(inner, f"{here}{'[]' if one.is_repeated else ''}.")


def plain(path: str) -> str:
    """Returns the path of a fault as `leaves` writes it."""
    parts = path.split(".")
    return ".".join(parts).replace(".0", "[]")


def automatic(call: BadCall) -> Iterator[Fault]:
    """Yields what is wrong in any field of its type: NUL in a text, a number no enum has, or no setting."""
    for path, one in leaves(call.request.DESCRIPTOR):
        if not _reachable(call.request, path) or (call.method.endswith("UpdateSlot") and path.startswith("spec.")):
            continue
        spoilt = path.replace("[]", ".0")
        if one.type == FieldDescriptor.TYPE_ENUM:
            yield spoilt, 99
        elif one.type == FieldDescriptor.TYPE_STRING and one.name != "paths":
            yield spoilt, ["\0"] if one.is_repeated else "\0"
        elif one.message_type is not None and one.message_type.GetOptions().map_entry:
            yield from ((spoilt, fault) for fault in SETTING_FAULTS)
        elif one.name == "page_size":
            yield from ((spoilt, fault) for fault in (1001, 2**32 - 1))


def _reachable(request: Any, path: str) -> bool:
    """Whether the messages that hold a field are there; to spoil one that is not would make it, unfinished."""
    message = request
    for part in path.split(".")[:-1]:
        name = part.removesuffix("[]")
        if part.endswith("[]"):
            if not getattr(message, name):
                return False
            message = getattr(message, name)[0]
        elif not message.HasField(name):
            return False
        else:
            message = getattr(message, name)
    return True


def many(count: int) -> dict[str, work_pb2.SettingValue]:
    """Returns so many settings."""
    return {f"s{number}": work_pb2.SettingValue(int_value=1) for number in range(count)}


SETTING_FAULTS: list[Any] = [
    many(65),
    {"": work_pb2.SettingValue(int_value=1)},
    {"n" * 65: work_pb2.SettingValue(int_value=1)},
    {"n": work_pb2.SettingValue()},
    {"n": work_pb2.SettingValue(double_value=float("nan"))},
    {"n": work_pb2.SettingValue(double_value=float("inf"))},
    {"n": work_pb2.SettingValue(string_value="x" * 4097)},
    {"n": work_pb2.SettingValue(string_value="\0")},
]


def bad_text(path: str, longest: int, *, required: bool = False) -> list[Fault]:
    """A text that is too long, or missing."""
    return [(path, "x" * (longest + 1)), *([(path, "")] if required else [])]


def bad_id(path: str, *, required: bool = True) -> list[Fault]:
    """Not a UUID, or missing."""
    return [(path, "no"), (path, "x" * 36), (path, ID + "0"), *([(path, "")] if required else [])]


def bad_ids(path: str, most: int) -> list[Fault]:
    """A list of UUIDs that is empty, too long or holds something else."""
    return [(path, []), (path, [ID] * (most + 1)), (path, [""]), (path, ["no"])]


def bad_number(path: str, *values: int) -> list[Fault]:
    """Numbers out of range."""
    return [(path, value) for value in values]


def bad_duration(path: str, longest: float, *, required: bool = False) -> list[Fault]:
    """A duration that is negative, too long or missing."""
    return [
        (path, seconds(-0.001)),
        (path, seconds(longest + 0.001)),
        (path, Duration(seconds=315_576_000_000)),
        *([(path, None)] if required else []),
    ]


def bad_day(path: str, *, required: bool = False) -> list[Fault]:
    """Not a date, or missing."""
    values = ("today", "2024-02-30", "20240101", "1969-12-31", "2024-1-1")
    return [*((path, value) for value in values), *([(path, "")] if required else [])]


def bad_client(path: str = "client") -> list[Fault]:
    """Whatever can be wrong with a ClientIdentity."""
    return [
        (path, None),
        *bad_text(f"{path}.client_id", 128, required=True),
        (f"{path}.client_id", "a b"),
        *bad_text(f"{path}.client_name", 128),
        *bad_number(f"{path}.instance_number", 65536, 2**32 - 1),
        *bad_number(f"{path}.user_folder_number", 65536, 2**32 - 1),
        (f"{path}.client_ip", "nowhere"),
        (f"{path}.client_ip", "300.1.1.1"),
    ]
