"""A call that waits for work answers its caller in time."""

from __future__ import annotations

import uuid

from google.protobuf.duration_pb2 import Duration
from muster.allocator.v1 import work_pb2

from tests.support.allocator import Allocator
from tests.support.services import StartService


async def test_a_wait_ends_before_the_deadline_of_its_caller(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    await allocator.slot(daily_quota=1)
    await allocator.take()
    request = work_pb2.AllocateWorkRequest(
        request_id=str(uuid.uuid4()),
        client=work_pb2.ClientIdentity(client_id="pc-1"),
        wait=Duration(seconds=30),
    )
    answer = await allocator.work.AllocateWork(request, metadata=allocator.worker, timeout=3)
    assert answer.no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
