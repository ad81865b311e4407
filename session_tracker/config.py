"""The session tracker's settings."""

from __future__ import annotations

from pydantic import Field

from services.config import GrpcConfig, MetricsConfig, PeerConfig, Section, ServiceConfig


class SessionsConfig(Section):
    """Live sessions: how many, and when silence means something."""

    # At under 1 KB each this bounds an organization to 100 MB.
    max_per_organization: int = Field(default=100_000, ge=1, le=10_000_000)
    # The least time without a page after which a running session is stalled; a slow one gets ten of its own pages.
    stalled_after_seconds: float = Field(default=30.0, gt=0)
    # Four missed reports at the pace of one every 30 s.
    lost_after_seconds: float = Field(default=120.0, gt=0)
    # A lost session whose worker never comes back would hold its memory for ever.
    forget_lost_after_seconds: float = Field(default=3600.0, gt=0)


class RenewalConfig(Section):
    """Leases renewed by progress."""

    # A tenth of the default lease of 5 minutes: several rounds may fail before a lease runs out.
    interval_seconds: float = Field(default=30.0, gt=0, le=3600)


class TrackerConfig(ServiceConfig):
    """All settings of the session tracker."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7403")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9403")
    sessions: SessionsConfig = SessionsConfig()
    renewal: RenewalConfig = RenewalConfig()
    # Whose leases are renewed; without a target none are.
    allocator: PeerConfig = PeerConfig()
