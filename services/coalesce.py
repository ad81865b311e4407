"""Coalescing: while one batch runs, arrivals queue; the next batch takes them all.

No timer and no added delay at low load; at high load one round trip and one commit serve many callers.
"""

from __future__ import annotations

import asyncio
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
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | BaseException]]],
        *,
        max_batch: int,
        max_waiting: int,
        lanes: int = 1,
    ) -> None:
        self._name = name
        self._run = run
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._free_lanes = lanes
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._batch_items = BATCH_ITEMS.labels(name)

    async def submit(self, item: Item) -> Result:
        """Returns what the batch made of `item`.

        Raises:
            Overloaded: `max_waiting` items wait already.
            BaseException: what `run` returned or raised for the item.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{self._name}: {self._max_waiting} calls wait already",
                retry_after_seconds=0.25,
                queue=self._name,
                limit=str(self._max_waiting),
            )
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._free_lanes:
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
            while self._waiting:
                batch: list[tuple[Item, asyncio.Future[Result]]] = []
                while self._waiting and len(batch) < self._max_batch:
                    item, future = self._waiting.popleft()
                    if not future.cancelled():
                        batch.append((item, future))
                if batch:
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
