"""Calls to the other services of the suite: always real gRPC, with the deadline and the tenant of the call in hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

import grpc

from services.call import current
from services.config import PeerConfig, read_secret

Stub = TypeVar("Stub")

_OPTIONS = (
    ("grpc.max_receive_message_length", 8 * 2**20),
    ("grpc.max_send_message_length", 8 * 2**20),
    # A peer that was restarted is found again within a second, not after grpc's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.lb_policy_name", "round_robin"),
)


class Peer:
    """A channel to another service.

    Args:
        config: Where it is and which key to show; a peer without a target is not configured.

    Raises:
        StartupError: the key cannot be read.
    """

    def __init__(self, config: PeerConfig) -> None:
        self.configured = bool(config.target)
        self._channel = grpc.aio.insecure_channel(config.target, options=_OPTIONS) if self.configured else None
        self._authorization = f"Bearer {read_secret(config.key_file)}" if config.key_file else ""

    def stub(self, factory: Callable[[grpc.aio.Channel], Stub]) -> Stub:
        """Returns a stub on the channel.

        Raises:
            ValueError: the peer is not configured.
        """
        if self._channel is None:
            raise ValueError("the peer is not configured")
        return factory(self._channel)

    def options(self, organization_id: UUID, *, at_most_seconds: float) -> dict[str, Any]:
        """Returns the keyword arguments of a call for a tenant: `timeout` and `metadata`.

        Args:
            organization_id: The tenant to act for.
            at_most_seconds: The longest the call may take; less when the call in hand has less left.
        """
        metadata = [("authorization", self._authorization), ("muster-organization", str(organization_id))]
        timeout = at_most_seconds
        try:
            call = current()
        except LookupError:
            pass
        else:
            timeout = min(timeout, call.remaining_seconds())
            metadata.append(("x-request-id", call.request_id))
            if call.traceparent:
                metadata.append(("traceparent", call.traceparent))
        return {"timeout": timeout, "metadata": tuple(metadata)}

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()
