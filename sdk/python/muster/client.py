"""The client: four services behind one object, with plain Python values in and out."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from muster.acts import Acts
from muster.archives import Archive
from muster.bundles import Bundles
from muster.calls import RetryPolicy, Transport
from muster.errors import NotConfigured
from muster.exits import Exits
from muster.following import LiveSession
from muster.insight import Insight
from muster.machines import Machines
from muster.personas import Personas
from muster.progress import Reporter
from muster.session_views import SessionFilter, SessionView
from muster.sessions import CheckpointPolicy, Sessions, SessionStart
from muster.slots import Slots
from muster.targets import Targets
from muster.values import plain
from muster.work import Work

_log = logging.getLogger("muster.progress")

_FLUSH_SECONDS = 5.0
_SNAPSHOT_BYTES = 16 * 2**10


class Client:
    """Talks to the services, as an async context manager.

    A service is connected to when it is first used; one without an address raises `NotConfigured` then.

    Args:
        api_key: The key to show; `muster key create` makes one.
        allocator: Its address, `host:port`; empty when it is not used.
        persona_store: Likewise.
        session_tracker: Likewise.
        archiver: Likewise.
        policy: How long calls may take.

    Attributes:
        policy: How long calls may take.
        work: Demands for work, leases and results.
        slots: Work slots.
        exits: Pooled exits and external providers.
        targets: Politeness and back-off.
        machines: The clients of the fleet.
        insight: Explanations, live figures and reports of the allocator.
        acts: What operators do by hand, and the audit.
        personas: Personas and leases on them.
        bundles: The bytes of personas.
        sessions: Live progress and final results.
        archive: Archive policies, runs and queries.
    """

    def __init__(
        self,
        *,
        api_key: str,
        allocator: str = "",
        persona_store: str = "",
        session_tracker: str = "",
        archiver: str = "",
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008  (frozen)
    ) -> None:
        allocation = Transport("allocator", "MUSTER_ALLOCATOR", allocator, api_key, policy)
        identities = Transport("persona_store", "MUSTER_PERSONA_STORE", persona_store, api_key, policy)
        tracking = Transport("session_tracker", "MUSTER_SESSION_TRACKER", session_tracker, api_key, policy)
        archiving = Transport("archiver", "MUSTER_ARCHIVER", archiver, api_key, policy)
        self._transports = (allocation, identities, tracking, archiving)
        self.policy = policy
        self.work = Work(allocation)
        self.slots = Slots(allocation)
        self.exits = Exits(allocation)
        self.targets = Targets(allocation)
        self.machines = Machines(allocation)
        self.insight = Insight(allocation)
        self.acts = Acts(allocation)
        self.personas = Personas(identities)
        self.bundles = Bundles(identities)
        self.sessions = Sessions(tracking)
        self.archive = Archive(archiving)
        self._reporting: tuple[Reporter, asyncio.Task[None]] | None = None

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008  (frozen)
    ) -> Self:
        """Makes a client as environment variables say.

        They are `MUSTER_API_KEY` (or `MUSTER_API_KEY_FILE`), `MUSTER_ALLOCATOR`, `MUSTER_PERSONA_STORE`,
        `MUSTER_SESSION_TRACKER` and `MUSTER_ARCHIVER`.

        Args:
            environ: Where they stand; None means the process's environment.
            policy: How long calls may take.

        Raises:
            NotConfigured: no key is given, or its file cannot be read.
        """
        given = os.environ if environ is None else environ
        return cls(
            api_key=_api_key(given),
            allocator=given.get("MUSTER_ALLOCATOR", ""),
            persona_store=given.get("MUSTER_PERSONA_STORE", ""),
            session_tracker=given.get("MUSTER_SESSION_TRACKER", ""),
            archiver=given.get("MUSTER_ARCHIVER", ""),
            policy=policy,
        )

    def session(
        self,
        session_id: str,
        *,
        total_pages: int = 0,
        stage: str = "",
        slot_id: str = "",
        client_id: str = "",
        tags: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        checkpoint: CheckpointPolicy | None = None,
        traceparent: str = "",
    ) -> LiveSession:
        """Makes a session to report from, as an async context manager; see `LiveSession`.

        Call it in the event loop. What it says is sent in the background until the client is closed, which waits up to
        5 s for final results that are not committed yet.

        Args:
            session_id: 1 to 128 characters.
            total_pages: Pages to do; 0 when unknown.
            stage: What it does first, up to 64 characters.
            slot_id: May be empty.
            client_id: May be empty.
            tags: Up to 16, of 1 to 64 characters.
            settings: What becomes the snapshot recorded with the result; values whose names look like secrets are
                redacted by the service. Left out, with a warning, when it is more than 16 KiB of JSON.
            checkpoint: Makes it important: its state survives a loss of the tracker's memory.
            traceparent: W3C trace context of the run; may be empty.
        """
        if self._reporting is None:
            reporter = Reporter(self.sessions, self.policy.call_seconds)
            self._reporting = reporter, asyncio.create_task(reporter.run(), name="muster progress")
        start = SessionStart(
            session_id,
            started_at=datetime.now(UTC),
            stage=plain(stage, 64),
            total_pages=total_pages,
            slot_id=slot_id,
            client_id=client_id,
            tags=tags,
            config_snapshot_json=_snapshot(session_id, settings or {}),
            checkpoint=checkpoint,
            traceparent=traceparent,
        )
        return LiveSession(self._reporting[0], start)

    def watch_sessions(
        self, filter: SessionFilter | None = None, *, interval: timedelta | None = None
    ) -> AsyncIterator[SessionView]:
        """Yields the latest state of the live sessions by id, again and again; see `Sessions.views`."""
        return self.sessions.views(filter, interval=interval)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; calls in flight end. Safe to call twice."""
        reporting, self._reporting = self._reporting, None
        if reporting is not None:
            await _stop(*reporting)
        for transport in self._transports:
            await transport.close()


async def _stop(reporter: Reporter, running: asyncio.Task[None]) -> None:
    if not running.done():
        await reporter.flush(_FLUSH_SECONDS)
    running.cancel()
    for outcome in await asyncio.gather(running, return_exceptions=True):
        if isinstance(outcome, Exception):
            _log.error("progress was not reported", exc_info=outcome)


def _snapshot(session_id: str, settings: Mapping[str, Any]) -> str:
    """Returns settings as JSON; nothing where the service would refuse it, since a run does not fail by its record."""
    if not settings:
        return ""
    try:
        snapshot = json.dumps(settings, ensure_ascii=False, allow_nan=False, default=str)
        if len(snapshot.encode()) <= _SNAPSHOT_BYTES:
            return snapshot
        why = f"they have more than {_SNAPSHOT_BYTES} bytes"
    except (ValueError, TypeError, RecursionError) as error:
        why = str(error)
    _log.warning("session %s: its settings are not recorded: %s", session_id, why)
    return ""


def connect() -> Client:
    """Returns a client as the environment says; see `Client.from_environment`.

    Raises:
        NotConfigured: no key is given, or its file cannot be read.
    """
    return Client.from_environment()


def _api_key(environ: Mapping[str, str]) -> str:
    key = environ.get("MUSTER_API_KEY", "").strip()
    file = environ.get("MUSTER_API_KEY_FILE", "")
    if key or not file:
        if not key:
            raise NotConfigured("no API key: set MUSTER_API_KEY or MUSTER_API_KEY_FILE")
        return key
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotConfigured(f"the API key's file {file} cannot be read: {error}") from None
    if not key:
        raise NotConfigured(f"the API key's file {file} is empty")
    return key
