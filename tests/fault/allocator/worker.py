"""A worker process: it takes work and submits it, twice, late or never, gives it back, and repeats what it asked.

Run as `python -m tests.fault.allocator.worker <settings as JSON>`. One that was killed comes back under its name: it
asks again what it has no answer to, and says goodbye for the instance that it was before.
"""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

from tests.fault.allocator.caller import Call, Caller, GaveUp, Refused
from tests.fault.allocator.history import End, Journal, read

_SERVICE = "/muster.allocator.v1.WorkService"
_OUTCOMES = {1: "succeeded", 2: "failed", 3: "blocked"}


class FleetWorker:
    """One process on a client.

    Args:
        name: The process's and the client's name.
        instance: Counts its lives.
        caller: Makes the calls.
        chance: What it does.
        lease_seconds: How long its leases last.
    """

    def __init__(self, name: str, instance: int, caller: Caller, chance: random.Random, lease_seconds: float) -> None:
        self._name = name
        self._client = work_pb2.ClientIdentity(client_id=name, instance_number=instance)
        self._caller = caller
        self._chance = chance
        self._lease_seconds = lease_seconds
        self._asked: deque[dict[str, Any]] = deque(maxlen=20)
        self._later: deque[tuple[float, work_pb2.Allocation]] = deque()

    def work_until(self, end: float) -> None:
        """Works until a moment, in seconds of the epoch."""
        while time.time() < end:
            try:
                self._round()
            except (GaveUp, Refused):
                # Noted; a worker has other work.
                continue

    def come_back(self, unanswered: list[dict[str, Any]]) -> None:
        """Says goodbye for the life before, and asks again what it did not hear the answer to."""
        before = work_pb2.ClientIdentity(client_id=self._name, instance_number=self._client.instance_number - 1)
        try:
            if self._chance.random() < 0.5:
                self._goodbye(before)
            for asked in unanswered:
                for allocation in self._ask(asked):
                    self._finish(allocation)
        except (GaveUp, Refused):
            return

    def _round(self) -> None:
        if self._asked and self._chance.random() < 0.06:
            # Told twice: the same leases, as far as they still live.
            self._ask(self._chance.choice(self._asked))
        asked = {
            "request_id": str(uuid.uuid4()),
            "items": self._chance.choice((1, 1, 2, 4, 8)),
            "target": self._chance.choice(("", "", "open", "narrow")),
            "client": self._name,
            "instance": self._client.instance_number,
        }
        allocations = self._ask(asked)
        self._asked.append(asked)
        for allocation in allocations:
            self._finish(allocation)
        while self._later and self._later[0][0] < time.time():
            self._submit(self._later.popleft()[1])
        if not allocations:
            time.sleep(0.05)

    def _finish(self, allocation: work_pb2.Allocation) -> None:
        fate = self._chance.random()
        if fate < 0.08:
            return
        if fate < 0.22:
            self._release(allocation)
        elif fate < 0.32:
            # Long enough for the unit to be handed out again: the result comes late.
            self._later.append((time.time() + self._lease_seconds * self._chance.uniform(0.9, 2.0), allocation))
        else:
            if fate < 0.45:
                self._renew(allocation)
            self._submit(allocation)
            if fate > 0.9:
                self._submit(allocation)

    def _ask(self, asked: dict[str, Any]) -> list[work_pb2.Allocation]:
        request = work_pb2.AllocateWorkRequest(
            request_id=asked["request_id"],
            client=work_pb2.ClientIdentity(client_id=asked["client"], instance_number=asked["instance"]),
            max_items=asked["items"],
            target=asked["target"],
        )
        method = f"{_SERVICE}/AllocateWork"
        answer = self._caller.call(
            Call("allocate", method, request, work_pb2.AllocateWorkResponse, asked, _told_of_allocations)
        )
        return list(answer.allocations)

    def _renew(self, allocation: work_pb2.Allocation) -> None:
        request = work_pb2.RenewLeasesRequest(leases=[_lease(allocation)])
        asked = {"keys": [allocation.allocation_key]}
        self._caller.call(
            Call("renew", f"{_SERVICE}/RenewLeases", request, work_pb2.RenewLeasesResponse, asked, _told_of_renewal)
        )

    def _release(self, allocation: work_pb2.Allocation) -> None:
        request = work_pb2.ReleaseLeasesRequest(leases=[_lease(allocation)])
        asked = {"keys": [allocation.allocation_key]}
        self._caller.call(
            Call(
                "release", f"{_SERVICE}/ReleaseLeases", request, work_pb2.ReleaseLeasesResponse, asked, _told_of_release
            )
        )

    def _submit(self, allocation: work_pb2.Allocation) -> None:
        # A blocked run makes its exit cool down, and pauses a slot without a target: only runs without an exit on the
        # target that is never paused say so, lest the fleet stand still.
        may_block = allocation.target == "open" and not allocation.HasField("exit")
        outcome = self._chance.choice((1, 1, 2, 3) if may_block else (1, 1, 1, 2))
        products = self._chance.randrange(3)
        request = work_pb2.SubmitResultsRequest(
            client=self._client,
            results=[
                work_pb2.WorkResult(
                    lease=_lease(allocation),
                    outcome=work_pb2.WorkOutcome.ValueType(outcome),
                    block_type="captcha" if outcome == 3 else "",
                    execution_time=Duration(seconds=1),
                    products=[work_pb2.Product(product_id=f"p{number}") for number in range(products)],
                )
            ],
        )
        asked = {"keys": [allocation.allocation_key], "outcome": _OUTCOMES[outcome], "products": products}
        self._caller.call(
            Call("submit", f"{_SERVICE}/SubmitResults", request, work_pb2.SubmitResultsResponse, asked, _told_of_result)
        )

    def _goodbye(self, identity: work_pb2.ClientIdentity) -> None:
        request = work_pb2.HeartbeatRequest(client=identity, goodbye=True)
        asked = {"client": identity.client_id, "instance": identity.instance_number}
        self._caller.call(
            Call("goodbye", f"{_SERVICE}/Heartbeat", request, work_pb2.HeartbeatResponse, asked, _told_of_goodbye)
        )


def _lease(allocation: work_pb2.Allocation) -> work_pb2.Lease:
    return work_pb2.Lease(allocation_key=allocation.allocation_key, lease_token=allocation.lease_token)


def _errors(items: Any) -> dict[str, Any]:
    return {"errors": [item.error.reason for item in items]}


def _told_of_allocations(answer: work_pb2.AllocateWorkResponse) -> dict[str, Any]:
    units = [
        {
            "key": unit.allocation_key,
            "token": unit.lease_token.hex(),
            "slot": unit.slot_id,
            "exit": unit.exit.exit_id,
            "target": unit.target,
            "work_date": unit.work_date,
            "expires_at": unit.expires_at.ToNanoseconds() / 1e9,
        }
        for unit in answer.allocations
    ]
    no_work = work_pb2.BlockerKind.Name(answer.no_work.blocker) if answer.HasField("no_work") else ""
    return {"units": units, "no_work": no_work.removeprefix("BLOCKER_KIND_")}


def _told_of_result(answer: work_pb2.SubmitResultsResponse) -> dict[str, Any]:
    (result,) = answer.results
    disposition = work_pb2.ResultDisposition.Name(result.disposition).removeprefix("RESULT_DISPOSITION_")
    recorded_at = result.recorded_at.ToNanoseconds()
    return {"disposition": disposition, "recorded_at": recorded_at, **_errors(answer.results)}


def _told_of_renewal(answer: work_pb2.RenewLeasesResponse) -> dict[str, Any]:
    return {"expires_at": answer.leases[0].expires_at.ToNanoseconds() / 1e9, **_errors(answer.leases)}


def _told_of_release(answer: work_pb2.ReleaseLeasesResponse) -> dict[str, Any]:
    return _errors(answer.leases)


def _told_of_goodbye(answer: work_pb2.HeartbeatResponse) -> dict[str, Any]:
    return {"released": answer.released_leases}


def main() -> None:
    """Runs one life of a worker."""
    settings = json.loads(sys.argv[1])
    folder, name, instance = Path(settings["folder"]), settings["name"], settings["instance"]
    chance = random.Random(f"{settings['seed']} {name} {instance}")
    mine = read(folder, [name])
    answered = {one.asked["request_id"] for one in mine if one.kind == "allocate" and one.end is not End.UNKNOWN}
    unanswered = {
        one.asked["request_id"]: one.asked
        for one in mine
        if one.kind == "allocate" and one.asked["request_id"] not in answered
    }
    journal = Journal(folder, name)
    caller = Caller(settings["addresses"], settings["key"], journal, chance)
    worker = FleetWorker(name, instance, caller, chance, settings["lease_seconds"])
    if instance:
        worker.come_back(list(unanswered.values())[-3:])
    worker.work_until(settings["end"])
    caller.close()
    journal.close()


if __name__ == "__main__":
    main()
