"""Policies: which table is partitioned how, and how long its rows stay hot and cold. Policies are data.

The defaults are those the documents ask for, where their tables stand: allocations weekly and 7 days hot, everything
else 90 days, daily counters 30 days.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import TYPE_CHECKING

import asyncpg
import structlog

from archiver.config import PolicyConfig
from archiver.errors import PolicyNotFound, TableUnsuitable
from archiver.sources import Sources
from archiver.tables import PartitionedTable, read_table
from services.errors import DomainError
from services.partitions import Interval

if TYPE_CHECKING:
    from archiver.store import Store

_log = structlog.get_logger("policies")


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy, as the contract describes it.

    Attributes:
        name: Its name, and the table's name in queries.
        source: The database, by its name in the configuration.
        schema: The table's schema.
        table: The table.
        interval: The length of its partitions.
        ahead: Partitions to keep ahead of the clock.
        hot_retention_days: How long a partition stays after its end; 0 for ever.
        cold_retention_days: How long a cold file stays after it was published; 0 for ever.
        legal_hold: Nothing is dropped.
        key_column: For the Bloom filter and the order of rows; empty for none.
        organization_column: Binds a row to its organization.
        version: 0 for one that was not put yet.
        partition_column: What the table is partitioned by, found out by `put`; kept, as cold files outlive the table.
    """

    name: str
    source: str
    schema: str
    table: str
    interval: Interval
    ahead: int = 3
    hot_retention_days: int = 0
    cold_retention_days: int = 0
    legal_hold: bool = False
    key_column: str = ""
    organization_column: str = "organization_id"
    version: int = 0
    partition_column: str = ""

    @property
    def qualified(self) -> str:
        """The table with its schema."""
        return f"{self.schema}.{self.table}"


def _default(table: str, interval: Interval, hot_retention_days: int, key_column: str = "") -> Policy:
    return Policy(
        table, "allocator", "allocator", table, interval, hot_retention_days=hot_retention_days, key_column=key_column
    )


DEFAULTS = (
    _default("work_allocations", Interval.WEEK, 7, "allocation_key"),
    _default("work_results", Interval.MONTH, 90),
    _default("product_results", Interval.MONTH, 90),
    _default("client_activity_logs", Interval.WEEK, 90),
    _default("exit_toggle_logs", Interval.MONTH, 90),
    _default("work_slots_history", Interval.MONTH, 90),
    _default("daily_work_tracking", Interval.MONTH, 30),
)


class Policies:
    """The policies on record.

    Args:
        store: Where they are.
        sources: The databases they may name.
    """

    def __init__(self, store: Store, sources: Sources) -> None:
        self._store = store
        self._sources = sources

    async def put(self, policy: Policy, based_on: int | None) -> Policy:
        """Makes or replaces a policy, after a look at its table.

        Args:
            policy: its version and partition column are of no account.
            based_on: The version it is based on; None for whatever stands.

        Raises:
            TableUnsuitable: the table does not suit it, or has a policy under another name.
            StaleVersion: another version stands, or none.
        """
        async with self._sources.session(policy.source) as connection:
            table = await read_table(connection, policy.schema, policy.table)
        table.check(policy.interval, policy.key_column, policy.organization_column)
        policy = replace(policy, partition_column=table.partition_column)
        try:
            version = await self._store.put_policy(policy, based_on)
        except asyncpg.UniqueViolationError:
            raise TableUnsuitable(
                f"{policy.qualified} has a policy under another name already", table=policy.qualified
            ) from None
        return replace(policy, version=version)

    async def all(self) -> list[Policy]:
        """Returns all policies, by name."""
        return await self._store.list_policies()

    async def named(self, names: list[str]) -> list[Policy]:
        """Returns the policies of these names; all of them when there are none.

        Raises:
            PolicyNotFound: one is not on record.
        """
        known = {policy.name: policy for policy in await self._store.list_policies()}
        for name in names:
            if name not in known:
                raise PolicyNotFound(f"there is no policy {name!r}", policy=name)
        return [known[name] for name in sorted(set(names))] if names else list(known.values())

    async def delete(self, name: str) -> None:
        """Forgets a policy; partitions and cold files stay."""
        await self._store.delete_policy(name)

    async def declare(self, declared: tuple[PolicyConfig, ...]) -> tuple[PolicyConfig, ...]:
        """Puts the policies of the configuration that differ from what stands; returns those that cannot be put yet."""
        standing = {policy.name: policy for policy in await self._store.list_policies()}
        waiting = []
        for config in declared:
            schema, _, table = config.table.partition(".")
            settings = config.model_dump(exclude={"table", "interval"})
            policy = Policy(schema=schema, table=table, interval=Interval(config.interval), **settings)
            known = standing.get(policy.name)
            if (known is None or replace(known, version=0, partition_column="") != policy) and not await self._try_put(
                policy
            ):
                waiting.append(config)
        return tuple(waiting)

    async def offer_defaults(self) -> bool:
        """Puts each default policy once, when its table stands; returns whether some still wait for theirs.

        One that an operator deleted is not put again, nor one whose table has a policy already.
        """
        standing = await self._store.list_policies()
        names = {policy.name for policy in standing}
        tables = {(policy.source, policy.qualified) for policy in standing}
        waiting = False
        for policy in DEFAULTS:
            if not self._sources.knows(policy.source) or await self._store.was_offered(policy.name):
                continue
            if policy.name in names or (policy.source, policy.qualified) in tables:
                continue
            if await self._try_put(policy):
                await self._store.offer_default(policy.name)
            else:
                waiting = True
        return waiting

    async def _try_put(self, policy: Policy) -> bool:
        try:
            await self.put(policy, None)
        except DomainError as error:
            _log.warning("a policy waits", policy=policy.name, reason=error.reason, message=error.message)
            return False
        return True


def past_retention(policy: Policy, end: date, today: date) -> bool:
    """Whether a partition that ends before `end` is wholly out of the hot window, in days of UTC."""
    return policy.hot_retention_days > 0 and end <= today - timedelta(days=policy.hot_retention_days)


def check_table(policy: Policy, table: PartitionedTable) -> None:
    """Checks a policy's table again, as both may have changed. Raises: TableUnsuitable."""
    table.check(policy.interval, policy.key_column, policy.organization_column)
