"""What the allocator can be told."""

from __future__ import annotations

from pydantic import Field

from services.config import GrpcConfig, MetricsConfig, PeerConfig, Section, ServiceConfig


class LeasesConfig(Section):
    """How long a lease lasts from its grant or renewal, and how old renewals may make it."""

    duration_seconds: float = Field(default=300.0, ge=1, le=3600)
    # A persona's check-out lives as long and a little longer, and the persona store allows 24 hours.
    greatest_age_seconds: float = Field(default=6 * 3600.0, ge=1, le=23 * 3600)
    # How often expired leases are looked for: the longest time that a unit stays away beyond its lease.
    sweep_seconds: float = Field(default=1.0, gt=0, le=60)


class ExitsConfig(Section):
    """Pooled exits."""

    # The documents' fixed bound.
    limit: int = Field(default=500, ge=1, le=100_000)


class AllocatorConfig(ServiceConfig):
    """Settings of the allocator."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7401")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9401")
    leases: LeasesConfig = LeasesConfig()
    exits: ExitsConfig = ExitsConfig()
    persona_store: PeerConfig = PeerConfig()
