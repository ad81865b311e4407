"""What the allocator can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

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
    # How often the pool is looked at for the forecast.
    sample_seconds: float = Field(default=15.0, gt=0, le=60)


class ShareConfig(Section):
    """How organizations share a replica."""

    # By organization id; 1 for others. Counts only while several wait.
    weights: dict[UUID, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)
    # Batches of different organizations that run at once. One that waits for a locked row holds its lane.
    lanes: int = Field(default=4, ge=1, le=64)


class CoolDownConfig(Section):
    """How long an exit is not used for a target after a fault: the first wait, doubled with each further fault."""

    rate_limited_seconds: float = Field(default=60.0, gt=0, le=86_400)
    blocked_seconds: float = Field(default=900.0, gt=0, le=86_400)
    transport_seconds: float = Field(default=120.0, gt=0, le=86_400)
    # Where the doubling ends. A target that asks for more (Retry-After) is given more.
    limit_seconds: float = Field(default=6 * 3600.0, gt=0, le=7 * 86_400)


class ExitProviderConfig(Section):
    """An external provider of exits, which is the sole master of their state."""

    # Its address without a path's end, such as https://exits.example/api.
    url: str = Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", max_length=512)
    # Holds the bearer token; without it calls carry none.
    token_file: Path | None = None
    # What our leases are known by there. Another installation under the same name would lose its leases as orphans.
    holder: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    # Of one try of one call.
    timeout_seconds: float = Field(default=2.0, gt=0, le=30)


class ExternalExitsConfig(Section):
    """External exits in general."""

    # How often leases that a provider holds for us are compared with ours.
    reconcile_seconds: float = Field(default=60.0, gt=0, le=3600)
    # Younger ones are left alone.
    grace_seconds: float = Field(default=60.0, ge=0, le=3600)
    # How long a provider that failed several times in a row is passed over before it is asked for its health.
    pause_seconds: float = Field(default=3.0, gt=0, le=600)


ProviderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class BackOffConfig(Section):
    """When a target that blocks is left alone, and for how long."""

    # The wait for the first probe. Each pause in a row doubles it, up to the limit.
    base_seconds: float = Field(default=60.0, gt=0, le=86_400)
    limit_seconds: float = Field(default=1800.0, gt=0, le=86_400)
    # Only results this recent count, and fewer of them say nothing.
    window_seconds: float = Field(default=600.0, gt=0, le=86_400)
    least_results: int = Field(default=10, ge=1, le=1000)
    # The part of them that must be passed.
    block_rate: float = Field(default=0.10, ge=0, lt=1)


class AllocatorConfig(ServiceConfig):
    """Settings of the allocator."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7401")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9401")
    leases: LeasesConfig = LeasesConfig()
    exits: ExitsConfig = ExitsConfig()
    back_off: BackOffConfig = BackOffConfig()
    cool_down: CoolDownConfig = CoolDownConfig()
    # By the name that slots ask for: [allocator.exit_providers.<name>].
    exit_providers: dict[ProviderName, ExitProviderConfig] = Field(default_factory=dict)
    external_exits: ExternalExitsConfig = ExternalExitsConfig()
    share: ShareConfig = ShareConfig()
    persona_store: PeerConfig = PeerConfig()
