"""Coalescing: while one batch runs, arrivals queue; the next batch takes them all.

No timer and no added delay at low load; at high load one round trip and one commit serve many callers.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from prometheus_client import Histogram

from services.errors import Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH_ITEMS = Histogram(
    "muster_coalesced_batch_items",
    "Items that one batch took together.",
    ["queue"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
)

WAIT_SECONDS = Histogram(
    "muster_coalesced_wait_seconds",
    "How long the first item of a batch waited until its batch began: the longest wait of the batch.",
    ["queue"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)


class Coalescer(Generic[Item, Result]):
    """Gathers concurrent calls into batches.

    A caller that is cancelled leaves the queue if its item has not been taken; a batch that has begun goes on for the
    others, so an item may take effect after its caller has gone. Idempotent operations make that harmless.

    Args:
        name: Names the queue in metrics and errors.
        run: Handles a batch and returns one result or exception for each item, in order. If it raises, every item of
            the batch gets the exception.
        max_batch: The most items a batch takes.
        max_waiting: The most items that may wait; one more is refused.
        lanes: How many batches may run at once.
        weigh: What an item counts for `least_beside`; 1 each by default.
        least_beside: A batch begins beside another only when what waits weighs as much: the answer to one call's wait
            for the disk is another batch, but not one of a single call.
        size: How many bytes an item holds; 0 each by default.
        max_batch_bytes: The most bytes a batch takes, but always one item.
        max_waiting_bytes: The most bytes that may wait; an item that would pass it is refused.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | BaseException]]],
        *,
        max_batch: int,
        max_waiting: int,
        lanes: int = 1,
        weigh: Callable[[Item], int] = lambda _: 1,
        least_beside: int = 1,
        size: Callable[[Item], int] = lambda _: 0,
        max_batch_bytes: int = sys.maxsize,
        max_waiting_bytes: int = sys.maxsize,
    ) -> None:
        self._name = name
        self._run = run
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._lanes = lanes
        self._free_lanes = lanes
        self._weigh = weigh
        self._least_beside = least_beside
        self._size = size
        self._max_batch_bytes = max_batch_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._weight = 0
        self._waiting_bytes = 0
        self._waiting: deque[tuple[Item, asyncio.Future[Result], float]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._batch_items = BATCH_ITEMS.labels(name)
        self._wait_seconds = WAIT_SECONDS.labels(name)

    async def submit(self, item: Item) -> Result:
        """Returns what the batch made of `item`.

        Raises:
            Overloaded: `max_waiting` items wait already, or too many bytes with this one.
            BaseException: what `run` returned or raised for the item.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{self._name}: {self._max_waiting} calls wait already",
                retry_after_seconds=0.25,
                queue=self._name,
                limit=str(self._max_waiting),
            )
        size = self._size(item)
        if self._waiting_bytes + size > self._max_waiting_bytes:
            raise Overloaded(
                f"{self._name}: {self._waiting_bytes} bytes wait already, and at most {self._max_waiting_bytes} may",
                retry_after_seconds=0.25,
                queue=self._name,
                limit_bytes=str(self._max_waiting_bytes),
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future, loop.time()))
        self._weight += self._weigh(item)
        self._waiting_bytes += size
        if self._free_lanes and (self._free_lanes == self._lanes or self._weight >= self._least_beside):
            self._free_lanes -= 1
            # In a context of its own: a batch is nobody's call, and must not run on the deadline of whoever came first.
            task = asyncio.create_task(self._drain(), name=f"coalesce {self._name}", context=Context())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await future

    async def close(self) -> None:
        """Waits until everything that was submitted is handled."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def _drain(self) -> None:
        try:
            # What is too little to go beside another batch is taken by whoever ends last.
            while self._waiting and (self._free_lanes == self._lanes - 1 or self._weight >= self._least_beside):
                batch: list[tuple[Item, asyncio.Future[Result]]] = []
                batch_bytes = 0
                first_at = 0.0
                while self._waiting and len(batch) < self._max_batch:
                    item, future, at = self._waiting[0]
                    size = self._size(item)
                    if batch and batch_bytes + size > self._max_batch_bytes:
                        break
                    self._waiting.popleft()
                    self._weight -= self._weigh(item)
                    self._waiting_bytes -= size
                    if not future.cancelled():
                        first_at = first_at or at
                        batch.append((item, future))
                        batch_bytes += size
                if batch:
                    self._wait_seconds.observe(asyncio.get_running_loop().time() - first_at)
                    await self._handle(batch)
        finally:
            self._free_lanes += 1

    async def _handle(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        self._batch_items.observe(len(batch))
        try:
            results: Sequence[Result | BaseException] = await self._run([item for item, _ in batch])
            if len(results) != len(batch):
                raise AssertionError(f"{self._name}: {len(results)} results for {len(batch)} items")
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
