"""The replicas of the fault runs: one that could not start is started again, one that crashed fails the run."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fault.replicas import REPLICAS, Replicas

# Only for a test that fails: a start takes some seconds.
_PATIENCE_SECONDS = 60.0


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    made = Replicas(tmp_path, "session_tracker", {})
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


async def _serves(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        answer = await stub.Check(request, timeout=_PATIENCE_SECONDS, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_replica_that_could_not_start_is_started_again(replicas: Replicas) -> None:
    first, *_ = REPLICAS
    assert await _serves(replicas.addresses[0])
    await replicas.replicas[first].kill()
    await asyncio.to_thread(replicas.postgres.stop)
    replicas.start_replica(first)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await replicas.failed.wait()
    await asyncio.to_thread(replicas.postgres.start)
    assert await _serves(replicas.addresses[0])
    assert replicas.failed_starts
    await replicas.all_well([], 0)


async def test_a_replica_that_crashed_fails_the_run_and_one_that_was_killed_stays_away(replicas: Replicas) -> None:
    first, second = REPLICAS
    await replicas.replicas[first].kill()
    # Not by `kill`: nobody is to know.
    replicas.replicas[second].send(signal.SIGKILL)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await replicas.failed.wait()
    # It was looked at before the second.
    assert replicas.replicas[first].code == -signal.SIGKILL
    assert await _serves(replicas.addresses[1])
    with pytest.raises(AssertionError, match="replica-2 ended by itself with -9"):
        await replicas.all_well([], 0)
