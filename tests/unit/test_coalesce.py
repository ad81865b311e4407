"""The coalescer: one batch at a time, everybody gets their own answer, the queue is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client.samples import Sample

from services.coalesce import WAIT_SECONDS, Coalescer
from services.errors import Overloaded


class Batches:
    """Records batches and holds each until it is let go."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()

    async def run(self, items: Sequence[int]) -> Sequence[int | BaseException]:
        self.seen.append(list(items))
        self.entered.set()
        await self.gate.wait()
        return [ValueError(item) if item < 0 else item * 10 for item in items]


async def gathered(coalescer: Coalescer[int, int], items: list[int]) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(coalescer.submit(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def test_arrivals_during_a_batch_go_together_into_the_next() -> None:
    batches = Batches()
    coalescer = Coalescer("t", batches.run, max_batch=3, max_waiting=100)
    first = await gathered(coalescer, [1])
    await batches.entered.wait()
    rest = await gathered(coalescer, [2, 3, 4, 5])
    batches.gate.set()
    assert await asyncio.gather(*first, *rest) == [10, 20, 30, 40, 50]
    assert batches.seen == [[1], [2, 3, 4], [5]]


async def test_each_item_gets_its_own_error() -> None:
    batches = Batches()
    batches.gate.set()
    coalescer = Coalescer("t", batches.run, max_batch=10, max_waiting=10)
    good, bad = await asyncio.gather(coalescer.submit(1), coalescer.submit(-1), return_exceptions=True)
    assert good == 10
    assert isinstance(bad, ValueError)


async def test_a_batch_that_raises_fails_all_its_items_and_the_next_goes_on() -> None:
    calls = 0

    async def run(items: Sequence[int]) -> Sequence[int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("gone")
        return items

    coalescer = Coalescer("t", run, max_batch=10, max_waiting=10)
    results = await asyncio.gather(coalescer.submit(1), coalescer.submit(2), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, OSError]
    assert await coalescer.submit(3) == 3


async def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    batches = Batches()
    coalescer = Coalescer("t", batches.run, max_batch=1, max_waiting=2)
    running = await gathered(coalescer, [1])
    await batches.entered.wait()
    waiting = await gathered(coalescer, [2, 3])
    with pytest.raises(Overloaded) as caught:
        await coalescer.submit(4)
    assert caught.value.retry_after_seconds
    batches.gate.set()
    assert await asyncio.gather(*running, *waiting) == [10, 20, 30]


async def test_a_queue_is_bounded_by_what_its_items_hold_too() -> None:
    batches = Batches()
    coalescer = Coalescer(
        "t",
        batches.run,
        max_batch=100,
        max_waiting=100,
        size=lambda item: item,
        max_batch_bytes=10,
        max_waiting_bytes=20,
    )
    # What runs does not wait, and what is alone goes through however large it is.
    tasks = await gathered(coalescer, [20])
    await batches.entered.wait()
    tasks += await gathered(coalescer, [4, 6, 5])
    with pytest.raises(Overloaded) as caught:
        await coalescer.submit(6)
    assert caught.value.metadata == {"queue": "t", "limit_bytes": "20"}
    assert caught.value.retry_after_seconds
    tasks += await gathered(coalescer, [5])
    batches.gate.set()
    assert await asyncio.gather(*tasks) == [200, 40, 60, 50, 50]
    assert batches.seen == [[20], [4, 6], [5, 5]]
    # A caller that gave up while it waited holds nothing.
    batches.gate.clear()
    batches.entered.clear()
    running = await gathered(coalescer, [1])
    await batches.entered.wait()
    (leaving,) = await gathered(coalescer, [20])
    leaving.cancel()
    batches.gate.set()
    await asyncio.gather(*running)
    await coalescer.close()
    assert await coalescer.submit(20) == 200


async def test_a_cancelled_caller_leaves_the_queue_and_disturbs_nobody() -> None:
    batches = Batches()
    coalescer = Coalescer("t", batches.run, max_batch=10, max_waiting=10)
    running = await gathered(coalescer, [1])
    await batches.entered.wait()
    leaving, staying = await gathered(coalescer, [2, 3])
    leaving.cancel()
    running[0].cancel()
    batches.gate.set()
    assert await staying == 30
    assert batches.seen == [[1], [3]]


async def test_the_longest_wait_of_each_batch_is_measured() -> None:
    batches = Batches()
    coalescer = Coalescer("waits", batches.run, max_batch=10, max_waiting=10)
    count = WAIT_SECONDS.labels("waits")
    tasks = await gathered(coalescer, [1])
    await batches.entered.wait()
    tasks += await gathered(coalescer, [2, 3])
    batches.gate.set()
    await asyncio.gather(*tasks)
    (waits,) = [
        sample for metric in WAIT_SECONDS.collect() for sample in metric.samples if _is(sample, "waits", "_count")
    ]
    assert waits.value == 2
    assert count._sum.get() > 0


def _is(sample: Sample, queue: str, suffix: str) -> bool:
    return sample.labels.get("queue") == queue and sample.name.endswith(suffix)


async def test_close_waits_for_what_was_submitted() -> None:
    batches = Batches()
    coalescer = Coalescer("t", batches.run, max_batch=1, max_waiting=10)
    tasks = await gathered(coalescer, [1, 2, 3])
    closing = asyncio.create_task(coalescer.close())
    await batches.entered.wait()
    assert not closing.done()
    batches.gate.set()
    await closing
    assert [task.done() for task in tasks] == [True, True, True]


async def test_a_batch_begins_beside_another_only_when_enough_waits_for_it() -> None:
    batches = Batches()
    coalescer = Coalescer(
        "t", batches.run, max_batch=100, max_waiting=100, lanes=2, weigh=lambda item: item, least_beside=10
    )
    tasks = await gathered(coalescer, [1])
    await batches.entered.wait()
    tasks += await gathered(coalescer, [4, 5])
    await asyncio.sleep(0)
    assert batches.seen == [[1]]
    tasks += await gathered(coalescer, [6])
    await asyncio.sleep(0)
    assert batches.seen == [[1], [4, 5, 6]]
    # No lane is free, and what is left is taken by whoever ends last.
    tasks += await gathered(coalescer, [2])
    batches.gate.set()
    assert await asyncio.gather(*tasks) == [10, 40, 50, 60, 20]
    assert batches.seen == [[1], [4, 5, 6], [2]]
    await coalescer.close()
