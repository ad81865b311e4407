"""The client: four services behind one object, with plain Python values in and out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from muster.acts import Acts
from muster.archives import Archive
from muster.bundles import Bundles
from muster.calls import RetryPolicy, Transport
from muster.errors import NotConfigured
from muster.exits import Exits
from muster.insight import Insight
from muster.machines import Machines
from muster.personas import Personas
from muster.sessions import Sessions
from muster.slots import Slots
from muster.targets import Targets
from muster.work import Work


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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; calls in flight end. Safe to call twice."""
        for transport in self._transports:
            await transport.close()


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
