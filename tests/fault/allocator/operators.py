"""An operator process: it toggles exits, switches and resizes slots, and makes new ones while the fleet works.

Run as `python -m tests.fault.allocator.operators <settings as JSON>`.
"""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from muster.allocator.v1 import exit_pb2, slot_pb2

from tests.fault.allocator.caller import Call, Caller, GaveUp, Refused
from tests.fault.allocator.history import Journal

_SLOTS = "/muster.allocator.v1.SlotService"
_EXITS = "/muster.allocator.v1.ExitService"


class FleetOperator:
    """Changes things.

    Args:
        caller: Makes the calls.
        chance: What it does.
        slots: The slots that it may change.
        exits: The exits that it may toggle and switch.
    """

    def __init__(self, caller: Caller, chance: random.Random, slots: list[str], exits: list[str]) -> None:
        self._caller = caller
        self._chance = chance
        self._slots = slots
        self._exits = exits

    def work_until(self, end: float) -> None:
        """Acts every now and then until a moment, in seconds of the epoch."""
        while time.time() < end:
            try:
                self._chance.choice((self._toggle, self._switch_exit, self._resize, self._pause, self._create))()
            except (GaveUp, Refused):
                continue
            time.sleep(self._chance.uniform(0.05, 0.5))

    def _toggle(self) -> None:
        exit_id = self._chance.choice(self._exits)
        request = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_id, reason="a new address")
        asked = {"exit": exit_id, "request_id": request.request_id}
        self._caller.call(Call("toggle", f"{_EXITS}/ToggleExit", request, exit_pb2.ToggleExitResponse, asked, _nothing))

    def _switch_exit(self) -> None:
        exit_id = self._chance.choice(self._exits)
        request = exit_pb2.SetExitEnabledRequest(exit_id=exit_id, enabled=self._chance.random() < 0.8)
        asked = {"exit": exit_id, "enabled": request.enabled}
        self._caller.call(
            Call("switch_exit", f"{_EXITS}/SetExitEnabled", request, exit_pb2.SetExitEnabledResponse, asked, _nothing)
        )

    def _resize(self) -> None:
        slot_id, quota = self._chance.choice(self._slots), self._chance.randint(1, 120)
        self._update("resize", slot_id, slot_pb2.SlotSpec(daily_quota=quota), "daily_quota", {"quota": quota})

    def _pause(self) -> None:
        slot_id, active = self._chance.choice(self._slots), self._chance.random() < 0.7
        self._update("pause", slot_id, slot_pb2.SlotSpec(is_active=active), "is_active", {"active": active})

    def _update(self, kind: str, slot_id: str, spec: slot_pb2.SlotSpec, field: str, asked: dict[str, Any]) -> None:
        request = slot_pb2.UpdateSlotRequest(slot_id=slot_id, spec=spec, update_mask=FieldMask(paths=[field]))
        self._caller.call(
            Call(
                kind,
                f"{_SLOTS}/UpdateSlot",
                request,
                slot_pb2.UpdateSlotResponse,
                {"slot": slot_id, **asked},
                _nothing,
            )
        )

    def _create(self) -> None:
        """Makes a slot that nobody changes: once it is acknowledged, it is certain what it has left."""
        target, quota = self._chance.choice(("", "open")), self._chance.randint(3, 25)
        self.create(f"made at {time.time():.3f}", target=target, quota=quota)

    def create(self, keyword: str, *, target: str, quota: int, steady: bool = True, with_exit: bool = False) -> str:
        """Makes a slot and returns its id. One that is `steady` is never changed."""
        request = slot_pb2.CreateSlotRequest(
            request_id=str(uuid.uuid4()),
            spec=slot_pb2.SlotSpec(
                keyword=keyword,
                target=target,
                start_date="2020-01-01",
                end_date="2099-12-31",
                daily_quota=quota,
                without_exit=not with_exit,
            ),
        )
        asked = {
            "request_id": request.request_id,
            "quota": quota,
            "target": target,
            "steady": steady,
            "with_exit": with_exit,
        }
        answer = self._caller.call(
            Call("create", f"{_SLOTS}/CreateSlot", request, slot_pb2.CreateSlotResponse, asked, _made)
        )
        return str(answer.slot.slot_id)


def _made(answer: slot_pb2.CreateSlotResponse) -> dict[str, Any]:
    return {"slot": answer.slot.slot_id}


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def main() -> None:
    """Runs an operator."""
    settings = json.loads(sys.argv[1])
    chance = random.Random(f"{settings['seed']} {settings['name']}")
    journal = Journal(Path(settings["folder"]), settings["name"])
    caller = Caller(settings["addresses"], settings["key"], journal, chance)
    FleetOperator(caller, chance, settings["slots"], settings["exits"]).work_until(settings["end"])
    caller.close()
    journal.close()


if __name__ == "__main__":
    main()
