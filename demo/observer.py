"""Keeps the scene up to date from the suite's own reads, and toggles exits that are used up, as an operator would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import muster

from demo.screen import ExitRow, Scene, Screen, SessionRow, SlotRow

_POLL_SECONDS = 0.5


class Observer:
    """Watches the suite while the fleet works.

    Args:
        client: With an operator's key.
        scene: What is shown.
        screen: Where it is shown.
        names: The exits' names by endpoint.
    """

    def __init__(self, client: muster.Client, scene: Scene, screen: Screen, names: dict[str, str]) -> None:
        self._client = client
        self._scene = scene
        self._screen = screen
        self._names = names
        self._sessions: dict[str, muster.Session] = {}
        self._keywords: dict[str, str] = {}
        self._explained: set[str] = set()

    async def run(self) -> None:
        """Watches until it is cancelled; a service that is away for a moment only leaves its part of the scene old."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for poll in (self._work, self._exits, self._progress, self._explain):
                group.create_task(self._poll(poll))

    async def _poll(self, poll: Callable[[], object]) -> None:
        while True:
            with suppress(muster.Unavailable):
                await poll()  # type: ignore[misc]
            self._screen.refresh()
            await asyncio.sleep(_POLL_SECONDS)

    async def _watch(self) -> None:
        async for changes in self._client.sessions.watch(interval=timedelta(milliseconds=200)):
            if changes.snapshot:
                self._sessions.clear()
            for session in changes.sessions:
                self._sessions[session.session_id] = session
            for session_id in changes.removed:
                self._sessions.pop(session_id, None)
            self._scene.sessions = [self._row(session) for session in self._sessions.values()]

    def _row(self, session: muster.Session) -> SessionRow:
        ends = session.estimated_completion
        return SessionRow(
            session.client_id,
            self._keywords.get(session.slot_id, ""),
            session.stage,
            session.current_page,
            session.total_pages,
            session.products_found,
            (ends - datetime.now(UTC)).total_seconds() if ends else None,
        )

    async def _work(self) -> None:
        rows = []
        async for row in self._client.insight.dashboard():
            day = row.tracking
            self._keywords[row.slot_id] = row.keyword
            ended = day.succeeded + day.failed + day.blocked + day.expired + day.released
            rows.append(
                SlotRow(
                    row.keyword, day.quota, day.succeeded, day.failed + day.blocked, day.allocated - ended, day.expired
                )
            )
        totals = await self._client.insight.totals()
        self._scene.slots = rows
        self._scene.leases = totals.leased
        self._scene.clients_online = totals.clients_online
        self._scene.check_ins_pending = totals.check_ins_pending
        self._scene.results = totals.today.succeeded + totals.today.failed + totals.today.blocked

    async def _progress(self) -> None:
        totals = await self._client.sessions.totals()
        self._scene.pages_per_second = totals.pages_per_second

    async def _exits(self) -> None:
        rows = []
        async for entry in self._client.exits.list():
            name = self._names.get(entry.spec.endpoint, "")
            rows.append(ExitRow(name, entry.spec.endpoint, entry.use_count, entry.spec.cap, entry.toggle_epoch))
            if entry.use_count >= entry.spec.cap:
                await self._client.exits.toggle(entry.exit_id, reason="used up")
                self._screen.event(f"{name} has used its {entry.spec.cap}: toggled", "cyan")
        self._scene.exits = rows

    async def _explain(self) -> None:
        for blocker in (await self._client.insight.explain()).blockers:
            if blocker.kind.name not in self._explained:
                self._explained.add(blocker.kind.name)
                self._screen.event(f"explain: {blocker.message}; {blocker.remedy}", "magenta")
