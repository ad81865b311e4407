"""The schedule: partitions and archive, once a day each, in a time zone, with catch-up after downtime.

Several replicas may keep the same schedule: making partitions is idempotent, and of two archive runs one finds the
tables locked and leaves the day to the other. At start partitions are always made, and the archive runs when its last
time passed while nobody was there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from zoneinfo import ZoneInfo

import structlog
from cronsim import CronSim

from archiver import metrics, partitions, runs
from archiver.config import PolicyConfig, ScheduleConfig
from archiver.errors import RunInProgress
from archiver.partitions import PartitionMaker
from archiver.policies import Policies
from archiver.runs import ArchiveRuns
from archiver.store import Store

_log = structlog.get_logger("schedule")

_ACTOR = "schedule"
_SETTLE_SECONDS = 60.0


class Schedule:
    """Runs the jobs on time.

    Args:
        config: When.
        declared: The policies of the configuration.
        store: The history, for catch-up.
        policies: Where declared policies and defaults go.
        maker: The job `partitions`.
        archive: The job `archive`.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        declared: tuple[PolicyConfig, ...],
        store: Store,
        policies: Policies,
        maker: PartitionMaker,
        archive: ArchiveRuns,
    ) -> None:
        self._config = config
        self._waiting = declared
        # Until the first attempt says that every policy stands.
        self._settling = True
        self._zone = ZoneInfo(config.time_zone)
        self._store = store
        self._policies = policies
        self._maker = maker
        self._archive = archive

    async def keep(self) -> None:
        """Keeps the schedule for ever. A job that fails is logged and counted, and tried again at its next time."""
        await self._attempt(partitions.JOB, self._run_partitions)
        await self._attempt(runs.JOB, self._catch_up)
        await asyncio.gather(
            self._repeat(partitions.JOB, self._config.partitions, self._run_partitions),
            self._repeat(runs.JOB, self._config.archive, self._run_archive),
            self._settle(),
        )

    async def _repeat(self, job: str, cron: str, run: Callable[[], Awaitable[None]]) -> None:
        while True:
            now = datetime.now(self._zone)
            await asyncio.sleep((next(CronSim(cron, now)) - now).total_seconds())
            await self._attempt(job, run)

    async def _attempt(self, job: str, run: Callable[[], Awaitable[None]]) -> None:
        try:
            last = await self._store.last_success(job)
            metrics.LAST_SUCCESS.labels(job).set(last.timestamp() if last else 0)
            await run()
        except RunInProgress as error:
            _log.info("another replica runs the job", job=job, message=error.message)
        except Exception as error:
            metrics.FAILURES.labels(job, "").inc()
            _log.error("a scheduled job failed", job=job, exc_info=error)

    async def _settle(self) -> None:
        """Puts the policies whose tables were not there at the start, as services may start in any order."""
        while self._settling:
            await asyncio.sleep(_SETTLE_SECONDS)
            await self._attempt(partitions.JOB, self._run_partitions)

    async def _run_partitions(self) -> None:
        self._waiting = await self._policies.declare(self._waiting)
        self._settling = await self._policies.offer_defaults() or bool(self._waiting)
        await self._maker.make([], _ACTOR)

    async def _run_archive(self) -> None:
        run = await self._archive.begin([], _ACTOR)
        async for _ in run.events():
            pass

    async def _catch_up(self) -> None:
        began = await self._store.last_run_began(runs.JOB)
        # Without a history nothing was missed.
        if began is not None and missed(self._config.archive, began, datetime.now(self._zone)):
            await self._run_archive()


def missed(cron: str, began: datetime, now: datetime) -> bool:
    """Whether a job's last time before `now` passed without a run that began then or later."""
    return bool(next(CronSim(cron, now, reverse=True)) > began)
