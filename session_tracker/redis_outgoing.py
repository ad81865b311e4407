"""What one replica writes of one organization: the latest state of each session that changed here, merged."""

from __future__ import annotations

import asyncio

from session_tracker.clock import Clock
from session_tracker.metrics import STORE_FLUSH, STORE_STATES
from session_tracker.organizations import Organization
from session_tracker.redis_packing import Packing, pack_ids
from session_tracker.redis_store import RedisStore

# Packed together, and handled by the store in one go: below a millisecond here and there.
_CHUNK_SESSIONS = 500
# Sent together: some megabytes at most, so that an answer comes long before the store is believed to be away.
_PIPELINE_CHUNKS = 8
# A flush takes at most a fifth of the time, so that it is reports which have the rest; under load more is merged.
_PAUSE = 4.0

_WRITTEN = STORE_STATES.labels("written")
_REFUSED = STORE_STATES.labels("refused")


class Outgoing:
    """Writes one organization's changes, for as long as one connection to the store holds.

    One flush is in flight. What changes meanwhile is a set of ids, so that it never grows beyond the sessions, and the
    next flush writes each as it stands then.

    Args:
        organization: Whose.
        store: Where to.
        packing: Of this replica.
        clock: The clock.
        interval_seconds: For how long changes are merged, at least.
    """

    def __init__(
        self, organization: Organization, store: RedisStore, packing: Packing, clock: Clock, interval_seconds: float
    ) -> None:
        self._organization = organization
        self._changes = organization.changes
        self._store = store
        self._packing = packing
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._pause_seconds = 0.0
        self._pending = self._changes.subscribe()
        # Up to this offset all is written but counters, which are written with every change.
        self._described = -1
        # Those of which counters alone are not enough.
        self._whole: set[str] = set()
        self._told: dict[str, int] = {}
        # Nothing is known of what stands in the store: all that is ours is written once.
        self._pending.update(organization.sessions)

    def close(self) -> None:
        """Ends the subscription."""
        self._changes.unsubscribe(self._pending)

    def know_command(self, session_id: str, number: int) -> None:
        """Notes a command that the store has."""
        self._told[session_id] = max(number, self._told.get(session_id, 0))

    def write_whole(self, session_id: str) -> None:
        """Has all of a session written next time, as nothing stands of it that its counters alone could go with."""
        self._whole.add(session_id)
        self._pending.add(session_id)

    async def next_flush(self) -> list[str]:
        """Waits for a change and until it is time, and then does as `flush`."""
        await asyncio.sleep(self._pause_seconds)
        while not self._pending:
            await self._changes.stirred.wait()
            self._changes.distribute()
        begun = self._clock.monotonic()
        refused = await self.flush()
        self._pause_seconds = max(self._interval_seconds, _PAUSE * (self._clock.monotonic() - begun))
        return refused

    async def flush(self) -> list[str]:
        """Writes what changed since the last flush; returns the ids of which the store took nothing.

        What is not taken is older than what stands, or counters alone, where this replica has not described it before.

        Raises:
            StoreUnavailable: some of it may not be written.
        """
        self._changes.distribute()
        ids = list(self._pending)
        self._pending.clear()
        offset = self._changes.offset
        with STORE_FLUSH.time():
            organization_id = self._organization.organization_id
            refused: list[str] = []
            chunks: list[bytes] = []
            commands: list[bytes] = []
            gone: list[str] = []
            for begin in range(0, len(ids), _CHUNK_SESSIONS):
                if chunk := self._pack(ids[begin : begin + _CHUNK_SESSIONS], commands, gone):
                    chunks.append(chunk)
                if len(chunks) == _PIPELINE_CHUNKS:
                    refused += await self._store.write(organization_id, chunks)
                    chunks.clear()
                await asyncio.sleep(0)
            if chunks:
                refused += await self._store.write(organization_id, chunks)
            for begin in range(0, len(commands), _CHUNK_SESSIONS):
                await self._store.command(organization_id, b"".join(commands[begin : begin + _CHUNK_SESSIONS]))
            for begin in range(0, len(gone), _CHUNK_SESSIONS):
                await self._store.drop(organization_id, pack_ids(gone[begin : begin + _CHUNK_SESSIONS]))
        self._described = offset
        if refused:
            _REFUSED.inc(len(refused))
        return refused

    def _pack(self, ids: list[str], commands: list[bytes], gone: list[str]) -> bytes:
        """Returns the entries of those that are ours, and adds to `commands` and `gone`."""
        organization, packing, described = self._organization, self._packing, self._described
        # Nobody takes over what is finished. A store that lost everything would not learn of an end whose owner died
        # with it, so each replica writes at first all the ends that it knows; they are refused where they stand.
        anew = described < 0
        organization.settle()
        sessions = organization.sessions
        ahead = packing.ahead()
        entries: list[bytes] = []
        for session_id in ids:
            session = sessions.get(session_id)
            if session is None:
                self._told.pop(session_id, None)
                self._whole.discard(session_id)
                gone.append(session_id)
            elif not session.owner or (anew and session.finished):
                whole = session.described > described or session_id in self._whole
                self._whole.discard(session_id)
                record = organization.export(session) if whole else None
                entries.append(packing.state(session, record, ahead))
            elif (command := session.rarities.command) and command.number > self._told.get(session_id, 0):
                # Another replica's session: its state is not ours to write, the command given here is.
                self._told[session_id] = command.number
                commands.append(packing.command(session_id, command.number, organization.export(session)))
        _WRITTEN.inc(len(entries))
        return b"".join(entries)
