"""What live progress leaves on a disk: nothing. The one row of a session comes with its end."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from muster.session_tracker.v1 import session_pb2 as pb

from services.call import Role
from tests.support.services import RunningService, StartService
from tests.support.watchers import Console, Worker

PAGES = 200


class Disk:
    """What the database knows of its tables."""

    def __init__(self, service: RunningService) -> None:
        self._dsn = service.dsn

    async def _fetch(self, statement: str) -> list[Any]:
        connection = await asyncpg.connect(self._dsn)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    async def tables(self) -> set[str]:
        rows = await self._fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'session_tracker'")
        return {row["tablename"] for row in rows}

    async def rows(self) -> dict[str, int]:
        """Returns the rows of each table that has any."""
        counts = {}
        for table in await self.tables() - {"alembic_version"}:
            ((count,),) = await self._fetch(f'SELECT count(*) FROM session_tracker."{table}"')
            counts[table] = count
        return {table: count for table, count in counts.items() if count}

    async def written(self) -> dict[str, int]:
        """Returns how long the file of each table is: it grows with a row's first version, and keeps what was ended."""
        return {
            table: (await self._fetch(f"SELECT pg_relation_size('session_tracker.\"{table}\"')"))[0][0]
            for table in await self.tables()
        }


@pytest.fixture
async def service(start_service: StartService) -> RunningService:
    return await start_service("session_tracker")


async def test_a_session_is_in_no_table_until_it_ends(service: RunningService) -> None:
    """ST-04, ST-06, ST-14: no table of live sessions, and no statement for a page."""
    metadata = await service.metadata(Role.WORKER)
    worker, console, disk = Worker(service, metadata), Console(service, metadata), Disk(service)
    assert "crawling_results" in await disk.tables()
    assert "crawling_sessions" not in await disk.tables()
    began = await disk.written()
    names = [f"s{number:02}" for number in range(50)]
    await worker.start(*names, slot_id="slot", config_snapshot_json='{"depth": 3}')
    console.open()
    for page in range(1, PAGES + 1):
        await worker.page(*names, page=page, stage=f"stage {page // 50}")
    await console.read_until(lambda held: {held.get(name, pb.Session()).current_page for name in names} == {PAGES})
    console.close()
    assert await disk.rows() == {}
    assert await disk.written() == began, "nothing was written that was deleted since, either"
    for name in names:
        await worker.complete(name, total_pages=PAGES)
    assert await disk.rows() == {"crawling_results": len(names)}
