"""External exits' providers: who is the sole master of an exit, and how this service stays on its feet when one fails.

The allocation key names the remote lease, so every call can be repeated: taking twice gives the same exit, giving back
twice is once. A remote lease is taken for the greatest age that ours can reach and so needs no renewal; it is given
back when ours ends. Nothing of a provider's state is kept here but the address of the exit that was given.

A provider that failed several times in a row is passed over for some seconds; then one call asks for its health, and
what was passed over meanwhile has cost nobody a wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeVar
from uuid import UUID

import structlog
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from allocator.metrics import PROVIDER_CALLS

_log = structlog.get_logger("allocator.exit_providers")

Answer = TypeVar("Answer")

# A lost answer is asked for again this often at most, after some hundredths of a second.
_TRIES = 3
_WAIT = wait_random_exponential(multiplier=0.05, max=0.5)
_AT_ONCE = 32
_FAILURES = 5


class ProviderFault(Exception):
    """The provider did not answer, or not as agreed.

    Args:
        message: What was wrong, for people.
        lost: Whether the same call may well succeed in a moment: no answer, or an answer that says so.
    """

    def __init__(self, message: str, *, lost: bool) -> None:
        super().__init__(message)
        self.lost = lost


class DemandRefused(ProviderFault):
    """The provider refused what one demand asks for: nothing was taken, and another demand may well be served."""

    def __init__(self, message: str) -> None:
        super().__init__(message, lost=False)


class NoneFree(Exception):
    """The provider answered that it has no exit for the region: nothing was taken."""


class ExitUnavailable(Exception):
    """There is no external exit to be had now.

    Args:
        message: Why, for people.
        may_be_held: Whether the provider may hold one under the key nonetheless: a call was made, and no answer says
            that nothing was taken.
    """

    def __init__(self, message: str, *, may_be_held: bool = False) -> None:
        super().__init__(message)
        self.may_be_held = may_be_held


@dataclass(frozen=True, slots=True)
class RemoteExit:
    """An exit that a provider gave: where to connect, and the address that targets see."""

    exit_ip: str
    endpoint: str
    region: str


class ExitProvider(Protocol):
    """One provider's interface, one call a method. Raises: ProviderFault, by every method."""

    async def take(self, key: UUID, organization_id: UUID, region: str, duration_seconds: float) -> RemoteExit:
        """Takes an exit of a region ('' for any) under a key, or returns the one it has already.

        Raises:
            NoneFree: it has none.
            DemandRefused: it gives none for what is asked.
        """

    async def give_back(self, key: UUID) -> None:
        """Gives the exit of a key back; one that is not held is given back already."""

    async def held(self, after: UUID | None) -> list[UUID]:
        """Returns the next page of keys under which we hold exits, in order; none after the last."""

    async def health(self) -> None:
        """Returns if the provider can serve."""

    async def close(self) -> None:
        """Closes connections."""


class Circuit:
    """Says whether a provider is to be called.

    closed ──5 failures in a row──> open ──pause──> one probe ──good──> closed
                                     ^──────────────────bad───────┘

    Args:
        pause_seconds: How long it is open.
        clock: Seconds that only grow.
    """

    def __init__(self, pause_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_seconds = pause_seconds
        self._clock = clock
        self._failures = 0
        self._probe_at: float | None = None
        self._probing = False

    @property
    def is_closed(self) -> bool:
        """Whether calls may be made."""
        return self._probe_at is None

    @property
    def is_resting(self) -> bool:
        """Whether no call may be made, and no probe is due either."""
        return self._probe_at is not None and (self._probing or self._clock() < self._probe_at)

    def may_probe(self) -> bool:
        """Whether the caller is to probe; who is told so must say how it went, or `give_up`."""
        if self.is_closed or self.is_resting:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """Notes a call that was answered."""
        self._failures, self._probe_at, self._probing = 0, None, False

    def failed(self) -> None:
        """Notes a call that was not."""
        self._failures += 1
        if self._failures >= _FAILURES:
            self._probe_at, self._probing = self._clock() + self._pause_seconds, False

    def give_up(self) -> None:
        """Notes a probe that was not brought to its end."""
        self._probing = False


class GuardedProvider:
    """A provider behind its circuit, with bounded retries and a bounded number of calls at once.

    Args:
        name: What slots call it.
        provider: The provider.
        circuit: Whether it is to be called.

    Attributes:
        last_error: What went wrong with the last call that failed or was refused; '' when none was.
        answered_at: When the last call was answered, by this process's clock; None when none was.
        available: Whether the last call was answered, leaving out demands that were refused.
        held: Exits that it held for live leases of ours at the last reconciliation by this replica.
        orphans_released: Since this replica started.
    """

    def __init__(self, name: str, provider: ExitProvider, circuit: Circuit) -> None:
        self.name = name
        self._provider = provider
        self._circuit = circuit
        self._calls = asyncio.Semaphore(_AT_ONCE)
        self.last_error = ""
        self.answered_at: datetime | None = None
        self.available = False
        self.held = 0
        self.orphans_released = 0

    async def take(self, key: UUID, organization_id: UUID, region: str, duration_seconds: float) -> RemoteExit:
        """Takes an exit, asking again for answers that were lost.

        Raises:
            ExitUnavailable: the provider failed, is passed over, or has none.
        """
        return await self._call(
            "take", lambda: self._provider.take(key, organization_id, region, duration_seconds), tries=_TRIES
        )

    async def give_back(self, key: UUID) -> None:
        """Gives an exit back. Raises: ExitUnavailable."""
        await self._call("give_back", lambda: self._provider.give_back(key))

    async def pages(self) -> AsyncIterator[list[UUID]]:
        """Pages through all keys under which exits are held. Raises: ExitUnavailable."""
        last: UUID | None = None
        while True:
            after = last
            page = await self._call("held", lambda after=after: self._provider.held(after))  # type: ignore[misc]
            if not page:
                return
            if sorted(page) != page or (after is not None and page[0] <= after):
                # Else a provider that repeats a page would never come to an end.
                self._note_fault(ProviderFault("the held leases are not in order", lost=False), "held")
                raise ExitUnavailable(self.last_error)
            last = page[-1]
            yield page

    async def health(self) -> None:
        """Asks for its health. Raises: ExitUnavailable."""
        await self._call("health", self._provider.health)

    def is_passed_over(self) -> bool:
        """Whether it failed so often that it is not called now, but for a probe when that is due."""
        return not self._circuit.is_closed

    def is_resting(self) -> bool:
        """Whether it is passed over and not even probed now, so that whoever asks for an exit gets none."""
        return self._circuit.is_resting

    async def close(self) -> None:
        """Closes connections."""
        await self._provider.close()

    async def _call(self, name: str, call: Callable[[], Awaitable[Answer]], *, tries: int = 1) -> Answer:
        async with self._calls:
            if not await self._is_callable():
                PROVIDER_CALLS.labels(self.name, name, "passed_over").inc()
                raise ExitUnavailable(f"{self.name} is passed over since it failed: {self.last_error}")
            tried = 0
            try:
                async for attempt in AsyncRetrying(
                    stop=stop_after_attempt(tries),
                    wait=_WAIT,
                    retry=retry_if_exception(self._is_worth_a_retry),
                    reraise=True,
                ):
                    tried += 1
                    with attempt:
                        answer = await self._counted(call, name)
            except NoneFree:
                PROVIDER_CALLS.labels(self.name, name, "none").inc()
                # A try before, whose answer was lost, may take effect yet.
                raise ExitUnavailable(f"{self.name} has no exit free for the region", may_be_held=tried > 1) from None
            except ProviderFault as error:
                PROVIDER_CALLS.labels(self.name, name, "failed").inc()
                refused = isinstance(error, DemandRefused)
                raise ExitUnavailable(f"{self.name}: {error}", may_be_held=tried > 1 or not refused) from error
            PROVIDER_CALLS.labels(self.name, name, "answered").inc()
            return answer

    def _is_worth_a_retry(self, error: BaseException) -> bool:
        return isinstance(error, ProviderFault) and error.lost and self._circuit.is_closed

    async def _is_callable(self) -> bool:
        if self._circuit.is_closed:
            return True
        if not self._circuit.may_probe():
            return False
        try:
            await self._counted(self._provider.health, "health")
        except ProviderFault:
            return False
        finally:
            self._circuit.give_up()
        return True

    async def _counted(self, call: Callable[[], Awaitable[Answer]], name: str) -> Answer:
        """Makes one call and tells the circuit how it went."""
        try:
            answer = await call()
        except NoneFree:
            self._note_answer()
            raise
        except ProviderFault as error:
            self._note_fault(error, name)
            raise
        self._note_answer()
        return answer

    def _note_answer(self) -> None:
        self._circuit.succeeded()
        self.available, self.answered_at = True, datetime.now(UTC)

    def _note_fault(self, error: ProviderFault, name: str) -> None:
        # What is refused to one demand says nothing of the others', and the circuit is that of all tenants.
        if not isinstance(error, DemandRefused):
            self._circuit.failed()
            self.available = False
        self.last_error = f"{name}: {error}"
        _log.warning("a provider of external exits failed", provider=self.name, call=name, error=str(error))
