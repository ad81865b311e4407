"""The worker loop: one unit of work after the other, with everything around it in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from types import TracebackType
from typing import Self

from muster.calls import may_repeat, pause_seconds
from muster.client import Client
from muster.errors import MusterError, RequestIdReused
from muster.jobs import Job
from muster.leases import HeldLease, LeaseKeeper
from muster.progress import Reporter
from muster.sessions import CheckpointPolicy
from muster.work import Allocation, BlockerKind, ClientIdentity, NoWork

_log = logging.getLogger("muster.worker")

HEARTBEAT_SECONDS = 60.0
"""How often an instance shows that it lives; one that is silent for 10 minutes counts as offline."""

_LONGEST_REST_SECONDS = 599.0
_FLUSH_SECONDS = 5.0
_GOODBYE_SECONDS = 2.0


class Worker:
    """One worker process, as an async context manager.

    While it is open it renews its leases, reports progress and sends heartbeats in the background. When it is left,
    what it still holds is given back, final session results are flushed for up to 5 s, and it says goodbye.

    Args:
        client: An open client; it stays open.
        client_id: The machine's own id, chosen by it and kept: 1 to 128 of `A-Z a-z 0-9 . _ : -`.
        instance_number: The process on that machine, 0 to 65535. Two live workers never share id and number: a goodbye
            of one would release the other's leases.
        folder: The browser profile folder it uses, 0 to 65535.
        client_name: For people, up to 128 characters.
        target: Only work for this target; empty for any.
        region: Only exits of this region; empty for any.
        checkpoint: Makes the sessions of its jobs important: their state survives a loss of the tracker's memory.
    """

    def __init__(
        self,
        client: Client,
        *,
        client_id: str,
        instance_number: int = 0,
        folder: int = 0,
        client_name: str = "",
        target: str = "",
        region: str = "",
        checkpoint: CheckpointPolicy | None = None,
    ) -> None:
        self._client = client
        self._identity = ClientIdentity(client_id, instance_number, client_name, folder)
        self._target = target
        self._region = region
        self._checkpoint = checkpoint
        self._reporter = Reporter(client.sessions, client.policy.call_seconds)
        self._keeper = LeaseKeeper(client.work)
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._current: Job | None = None

    def stop(self) -> None:
        """Ends `jobs` after the job in hand; safe to call from a signal handler of the loop, and twice."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether it takes no more work: it was stopped, or the service told it to drain."""
        return self._stopping.is_set()

    async def jobs(self, *, stop_when_idle: timedelta | None = None) -> AsyncIterator[Job]:
        """Yields jobs one after the other, for as long as it takes, until `stop` or until told to drain.

        A job that is left without a result is given back when the next one is asked for. When there is no work it rests
        for as long as the service says; while the allocator is away it keeps trying.

        Args:
            stop_when_idle: End when there has been no work for so long; None means never.

        Raises:
            MusterError: the service refuses to give work at all, such as for a wrong API key.
        """
        clock = asyncio.get_running_loop().time
        idle_since = clock()
        request_id, failures, asked_at = str(uuid.uuid4()), 0, clock()
        while not self.stopping:
            try:
                answer = await self._client.work.allocate(
                    self._identity,
                    target=self._target,
                    region=self._region,
                    request_id=request_id,
                    total_seconds=self._client.policy.call_seconds,
                )
            except RequestIdReused:
                # The lost answer held leases, and they have ended meanwhile: the demand is spent.
                request_id = str(uuid.uuid4())
                continue
            except MusterError as error:
                if not may_repeat(error, idempotent=True):
                    raise
                # The demand keeps its request id, so that a lease granted in a lost answer comes with the next one.
                failures += 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                _log.log(level, "no answer to the demand for work, trying on: %s", error)
                idle_since = clock()
                await self._rest(pause_seconds(error, failures))
                continue
            for allocation in answer.allocations:
                job = self._take(allocation, asked_at)
                try:
                    yield job
                finally:
                    await self._settle()
                idle_since = clock()
            request_id, failures = str(uuid.uuid4()), 0
            if answer.no_work is not None and not answer.allocations:
                await self._pause(answer.no_work, idle_since, stop_when_idle)
            asked_at = clock()

    async def __aenter__(self) -> Self:
        for background in (self._reporter.run, self._keeper.run, self._beat):
            self._tasks.append(asyncio.create_task(background(), name=f"muster {background.__qualname__}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        reporting, _, beating = self._tasks
        try:
            await self._settle()
            if not reporting.done():
                await self._reporter.flush(_FLUSH_SECONDS)
            # A heartbeat that comes after the goodbye would have the instance online again.
            beating.cancel()
            await asyncio.wait([beating])
            with contextlib.suppress(MusterError):
                await self._client.work.heartbeat(self._identity, goodbye=True, total_seconds=_GOODBYE_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()
            for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    _log.error("a background task of the worker failed", exc_info=outcome)

    def _take(self, allocation: Allocation, asked_at: float) -> Job:
        key = allocation.allocation_key
        held = HeldLease(allocation, asked_at, lambda: self._reporter.taken_at(key))
        self._current = Job(held, self._identity, self._client, self._keeper, self._reporter, self._checkpoint)
        return self._current

    async def _settle(self) -> None:
        job, self._current = self._current, None
        if job is not None:
            await job.release("the worker left it without a result")

    async def _pause(self, no_work: NoWork, idle_since: float, stop_when_idle: timedelta | None) -> None:
        if no_work.blocker is BlockerKind.CLIENT_DRAINING:
            _log.info("told to drain")
            self.stop()
            return
        rest = min(max(no_work.retry_after.total_seconds(), 0.1), _LONGEST_REST_SECONDS)
        if stop_when_idle is not None:
            left = idle_since + stop_when_idle.total_seconds() - asyncio.get_running_loop().time()
            if left <= 0:
                self.stop()
                return
            rest = min(rest, left)
        _log.debug("no work (%s): %s", no_work.blocker.name.lower(), no_work.message)
        await self._rest(rest)

    async def _rest(self, seconds: float) -> None:
        """Waits, but not longer than until `stop`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                reply = await self._client.work.heartbeat(self._identity, total_seconds=HEARTBEAT_SECONDS)
            except MusterError as error:
                _log.warning("no heartbeat got through: %s", error)
                continue
            if reply.drain:
                _log.info("told to drain")
                self.stop()
