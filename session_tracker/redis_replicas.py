"""The other replicas: who was heard of when, and how much of the store's life each has seen."""

from __future__ import annotations

from dataclasses import dataclass

from session_tracker.clock import Clock


@dataclass(slots=True)
class _Replica:
    """What is known of another replica.

    Attributes:
        heard: When it last gave a sign of life, on the monotonic clock; or when it was first heard of by its sessions.
        epoch: Of the store, all of which it has rewritten and read; empty while it has not.
    """

    heard: float
    epoch: str = ""


class Replicas:
    """The other replicas that this one knows of.

    Args:
        clock: The clock.
        life_seconds: How long a sign of life is believed.
    """

    def __init__(self, clock: Clock, life_seconds: float) -> None:
        self._clock = clock
        self._life_seconds = life_seconds
        self._known: dict[str, _Replica] = {}

    def beat(self, replica: str, epoch: str) -> None:
        """Takes a sign of life."""
        self._known[replica] = _Replica(self._clock.monotonic(), epoch)

    def meet(self, replica: str) -> None:
        """Notes a replica that wrote something, and may have died before its first sign of life came through here."""
        self._known.setdefault(replica, _Replica(self._clock.monotonic()))

    def leave(self, replica: str) -> None:
        """Notes that a replica says it is going."""
        self._known[replica] = _Replica(float("-inf"))

    def forget(self, replica: str) -> None:
        """Forgets one that is dead and has nothing any more."""
        self._known.pop(replica, None)

    def wait(self) -> None:
        """Begins the wait for signs of life afresh, for all: nothing could be heard until now."""
        now = self._clock.monotonic()
        for replica in self._known.values():
            replica.heard, replica.epoch = now, ""

    def silent(self) -> list[str]:
        """Returns those whose last sign of life is too old to be believed."""
        before = self._clock.monotonic() - self._life_seconds
        return [name for name, replica in self._known.items() if replica.heard < before]

    def lives(self, replica: str) -> bool:
        """Whether a sign of life of a replica is believed."""
        known = self._known.get(replica)
        return known is not None and known.heard >= self._clock.monotonic() - self._life_seconds

    def hold(self, epoch: str) -> bool:
        """Whether all that are believed alive have rewritten and read all of `epoch`."""
        before = self._clock.monotonic() - self._life_seconds
        return all(replica.epoch == epoch for replica in self._known.values() if replica.heard >= before)
