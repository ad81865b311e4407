"""Threads for what blocks: ADBC, Parquet, DataFusion's planner. Two at once, so as not to crowd out the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_THREADS = 2


class Threads:
    """A bounded pool of threads."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, "archiver")

    async def run(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """Runs a function in a thread and returns what it returns.

        When the caller is cancelled, every `threading.Event` among the arguments is set, and the cancellation goes on
        when the function has ended: nothing it uses is taken from under it.
        """
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, lambda: function(*arguments, **named))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            for argument in (*arguments, *named.values()):
                if isinstance(argument, Event):
                    argument.set()
            future.cancel()
            await asyncio.wait([future])
            raise

    async def close(self) -> None:
        """Waits for what runs and ends the threads."""
        await asyncio.to_thread(self._executor.shutdown)
