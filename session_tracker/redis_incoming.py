"""What one replica learns of the others' sessions: from the store as a whole, and then from what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from session_tracker import records, redis_packing
from session_tracker.metrics import STORE_STATES
from session_tracker.organizations import Organization
from session_tracker.records import Counters
from session_tracker.redis_outgoing import Outgoing
from session_tracker.redis_store import RedisStore
from session_tracker.sessions import COMPLETED

_RECEIVED = STORE_STATES.labels("received")
# Sessions asked for in one go.
_ASK_SESSIONS = 500


class Incoming:
    """Keeps one organization's mirrors of the others' sessions, for as long as one connection to the store holds.

    What is older than what is here changes nothing, in whichever order it comes; so what is said may be taken before,
    while and after the whole is read.

    Args:
        organization: Whose.
        store: Where from.
        outgoing: Told which commands the store has.
        replica: This replica's id: what it owns is not taken from elsewhere.
        meet: Called with every owner.
    """

    def __init__(
        self,
        organization: Organization,
        store: RedisStore,
        outgoing: Outgoing,
        replica: str,
        meet: Callable[[str], None],
    ) -> None:
        self._organization = organization
        self._store = store
        self._outgoing = outgoing
        self._replica = replica
        self._meet = meet
        self._wanted: set[str] = set()
        self._ended: set[str] = set()
        self._asked = asyncio.Event()

    def states(self, body: bytes) -> None:
        """Takes what another replica wrote."""
        organization = self._organization
        # What was reported here and not yet counted would otherwise claim a session back that has moved on.
        organization.settle()
        count = 0
        for session_id, owner, counters, record in redis_packing.states(body):
            count += 1
            if record:
                self._apply(session_id, owner, counters, record)
            elif organization.apply_counters(session_id, owner, counters) is None:
                self._want(session_id)
        _RECEIVED.inc(count)

    def commands(self, body: bytes) -> None:
        """Takes commands that another replica gave."""
        for session_id, number, record in redis_packing.commands(body):
            self._command(session_id, number, record)

    def _command(self, session_id: str, number: int, record: bytes) -> None:
        session = self._organization.sessions.get(session_id)
        self._outgoing.know_command(session_id, number)
        if session is not None and not session.finished:
            # The counters are of no interest, nor is any other part of its state.
            self._organization.apply_command(records.whole(record, self._organization.counters(session)))

    def drops(self, body: bytes) -> None:
        """Forgets what its owner forgot."""
        for session_id in redis_packing.ids(body):
            self._drop(session_id)

    def ends(self, body: bytes) -> None:
        """Forgets what was completed elsewhere before it was known there."""
        for session_id in redis_packing.ids(body):
            self._end(session_id)

    def _end(self, session_id: str) -> None:
        session = self._organization.sessions.get(session_id)
        if session is not None and not session.finished:
            self._organization.drop(session_id)

    def _drop(self, session_id: str) -> None:
        session = self._organization.sessions.get(session_id)
        if session is not None and session.owner and not session.finished:
            self._organization.drop(session_id)

    def _want(self, session_id: str) -> None:
        self._wanted.add(session_id)
        self._asked.set()

    async def loop(self) -> None:
        """Asks the store for sessions of which only the counters came, and says which ended, until it fails."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            if self._ended:
                ended, self._ended = list(self._ended), set()
                await self._store.say_ended(self._organization.organization_id, redis_packing.pack_ids(ended))
            wanted, self._wanted = list(self._wanted), set()
            for begin in range(0, len(wanted), _ASK_SESSIONS):
                await self.ask(wanted[begin : begin + _ASK_SESSIONS])

    async def ask(self, session_ids: Sequence[str]) -> None:
        """Takes some sessions from the store."""
        self._take(await self._store.read(self._organization.organization_id, session_ids))

    async def reconcile(self, refused: Sequence[str]) -> None:
        """Takes what stands in the store where it refused a state; what is still newer here is written whole.

        Args:
            refused: Ids of sessions whose states it did not take.
        """
        organization_id = self._organization.organization_id
        stored = await self._store.read(organization_id, refused)
        former = []
        for session_id, packed, _ in stored:
            owner, counters = redis_packing.unpack_counters(packed)
            session = self._organization.sessions.get(session_id)
            if owner == self._replica and session is not None and not session.owner and not session.finished:
                order = counters.sequence, counters.revision
                if counters.state < COMPLETED and order > (session.sequence, session.revision):
                    # It was forgotten here and begun again before the store knew of the first.
                    former.append(session_id)
        if former:
            await self._store.drop(organization_id, redis_packing.pack_ids(former))
        self._take(stored)
        for session_id in refused:
            session = self._organization.sessions.get(session_id)
            if session is not None and not session.owner:
                self._outgoing.write_whole(session_id)

    async def load(self) -> None:
        """Takes all that the store has."""
        organization_id = self._organization.organization_id
        async for page in self._store.sessions(organization_id):
            self._take(page)
            await asyncio.sleep(0)
        for session_id, entry in await self._store.commands(organization_id):
            self._command(session_id, *redis_packing.command(entry))

    def _take(self, stored: Sequence[tuple[str, bytes, bytes]]) -> None:
        self._organization.settle()
        for session_id, packed, record in stored:
            owner, counters = redis_packing.unpack_counters(packed)
            if not record or (owner == self._replica and counters.state >= COMPLETED):
                # A live one of that id was begun by somebody who does not know any more, or never heard, of its end.
                self._end(session_id)
                continue
            if owner == self._replica:
                continue
            self._meet(owner)
            self._apply(session_id, owner, counters, record)

    def _apply(self, session_id: str, owner: str, counters: Counters, record: bytes) -> None:
        known = records.whole(record, counters)
        taken = self._organization.apply_remote(known, owner)
        if known.command is not None:
            self._outgoing.know_command(session_id, known.command.number)
        if not taken and counters.state < COMPLETED and session_id not in self._organization.sessions:
            # It was completed here before it was known here: its owner does not know that it ended.
            self._ended.add(session_id)
            self._asked.set()

    async def prune(self, lives: Callable[[str], bool], epoch: str) -> None:
        """Forgets mirrors that the store does not have: they ended, or were forgotten, while it could not be heard.

        Args:
            lives: Whether a replica does, and so has written all that it owns; those of another are inherited instead.
            epoch: In which they have.

        Raises:
            StoreUnavailable: the store has lost what it held in that epoch; nothing was forgotten for it.
        """
        mirrors = [
            session.session_id
            for session in self._organization.sessions.values()
            if session.owner and not session.finished and lives(session.owner)
        ]
        for begin in range(0, len(mirrors), _ASK_SESSIONS):
            some = mirrors[begin : begin + _ASK_SESSIONS]
            stored = await self._store.read(self._organization.organization_id, some)
            found = {session_id for session_id, _, record in stored if record}
            if len(found) < len(some):
                # A store that lost all since would have none of them.
                await self._store.confirm(epoch)
            for session_id in some:
                if session_id not in found:
                    self._drop(session_id)
