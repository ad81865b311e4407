"""API keys: made, listed and revoked by operators, and looked up on every call through a bounded cache."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import uuid_utils.compat as uuid7

from services.call import Principal, Role
from services.errors import DomainError, InvalidApiKey, StartupError
from services.postgres import Database, queries

_SQL = queries("services.identity", "keys.sql")

# How long a looked-up key is trusted: the longest time that a revoked key still works.
TRUST_SECONDS = 30.0
# How long it is trusted when the database does not answer, so that live progress goes on without it.
STALE_SECONDS = 900.0
_CACHE_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key on record; the secret itself is not kept."""

    key_id: UUID
    organization: str
    role: Role
    name: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class KeyStore:
    """Keys and organizations in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        organization: str,
        role: Role,
        *,
        name: str = "",
        time_zone: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[UUID, str]:
        """Makes a key, and its organization if need be, and returns its id and the key, which is shown only here.

        Args:
            organization: The organization's name, 1 to 128 characters.
            role: What the key may do.
            name: For people.
            time_zone: An IANA name for the organization; None keeps it, or means UTC for a new one.
            expires_at: From when on it is refused; None for never.

        Raises:
            StartupError: the time zone is unknown.
        """
        if time_zone is not None and not await self._database.fetchval(_SQL["is_time_zone"], time_zone):
            raise StartupError(f"unknown time zone {time_zone!r}: use an IANA name such as Asia/Seoul")
        row = await self._database.fetchrow(_SQL["ensure_organization"], uuid7.uuid7(), organization, time_zone)
        assert row is not None
        key_id, key = uuid7.uuid7(), new_key()
        await self._database.execute(
            _SQL["insert_key"], key_id, _digest(key), row["organization_id"], int(role), name, expires_at
        )
        return key_id, key

    async def list(self) -> list[ApiKey]:
        """Returns every key on record, newest first."""
        rows = await self._database.fetch(_SQL["list_keys"])
        return [ApiKey(**{**row, "role": Role(row["role"])}) for row in rows]

    async def revoke(self, key_id: UUID) -> bool:
        """Revokes a key within `TRUST_SECONDS`; False when there is none with this id."""
        return await self._database.fetchval(_SQL["revoke_key"], key_id) is not None

    async def find(self, key: str) -> Principal | None:
        """Returns who a key names, or None."""
        row = await self._database.fetchrow(_SQL["find_key"], _digest(key))
        if row is None:
            return None
        return Principal(str(row["key_id"]), row["organization_id"], Role(row["role"]), row["time_zone"])

    async def time_zone(self, organization_id: UUID) -> str | None:
        """Returns an organization's time zone, or None when there is no such organization."""
        found: str | None = await self._database.fetchval(_SQL["find_time_zone"], organization_id)
        return found


class Authenticator:
    """Says who makes a call, from its metadata; remembers keys for `TRUST_SECONDS`.

    Unknown keys are not remembered beyond the look-up in flight, so a key works as soon as it is made.
    """

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._known: OrderedDict[str, tuple[float, Principal]] = OrderedDict()
        self._zones: dict[UUID, tuple[float, str]] = {}
        self._looking: dict[str, asyncio.Task[Principal | None]] = {}

    def remembered(self, authorization: str) -> Principal | None:
        """Returns the principal of an `authorization` value that was looked up lately, without waiting."""
        entry = self._known.get(authorization)
        if entry is not None and entry[0] > time.monotonic():
            return entry[1]
        return None

    async def authenticate(self, authorization: str) -> Principal:
        """Returns the principal of an `authorization` value.

        Raises:
            InvalidApiKey: it names none.
            DatabaseUnavailable: it is not remembered and the database does not answer.
        """
        if (known := self.remembered(authorization)) is not None:
            return known
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.isascii() or not 20 <= len(key) <= 200:
            raise InvalidApiKey
        # Callers that ask for the same key at once share one look-up.
        task = self._looking.get(authorization)
        if task is None:
            task = asyncio.create_task(self._store.find(key))
            self._looking[authorization] = task
            task.add_done_callback(lambda _: self._looking.pop(authorization, None))
        now = time.monotonic()
        try:
            principal = await asyncio.shield(task)
        except DomainError:
            entry = self._known.get(authorization)
            if entry is not None and entry[0] + STALE_SECONDS > now:
                return entry[1]
            raise
        if principal is None:
            self._known.pop(authorization, None)
            raise InvalidApiKey
        self._known[authorization] = (now + TRUST_SECONDS, principal)
        self._known.move_to_end(authorization)
        if len(self._known) > _CACHE_ENTRIES:
            self._known.popitem(last=False)
        return principal

    async def acting_for(self, service: Principal, organization: str) -> Principal:
        """Returns the principal of a service that acts for the organization it names.

        Raises:
            InvalidApiKey: there is no such organization.
        """
        try:
            organization_id = UUID(organization)
        except ValueError:
            raise InvalidApiKey from None
        entry = self._zones.get(organization_id)
        if entry is None or entry[0] < time.monotonic():
            try:
                zone = await self._store.time_zone(organization_id)
            except DomainError:
                if entry is None:
                    raise
                zone = entry[1]
            if zone is None:
                raise InvalidApiKey
            entry = (time.monotonic() + TRUST_SECONDS, zone)
            self._zones[organization_id] = entry
        return Principal(service.key_id, organization_id, Role.SERVICE, entry[1])


def new_key() -> str:
    """Returns a fresh key of 256 random bits."""
    return "muster_" + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
