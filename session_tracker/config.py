"""The session tracker's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator

from services.config import GrpcConfig, MetricsConfig, PeerConfig, Section, ServiceConfig, read_secret


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
    # Long enough for every watcher to see how a session ended.
    finished_seconds: float = Field(default=60.0, ge=0, le=3600)


class RenewalConfig(Section):
    """Leases renewed by progress."""

    # A tenth of the default lease of 5 minutes: several rounds may fail before a lease runs out.
    interval_seconds: float = Field(default=30.0, gt=0, le=3600)


class EngineConfig(Section):
    """Where live sessions are: in this process alone, or shared with other replicas through Redis."""

    kind: Literal["memory", "redis"] = "memory"
    # redis://, rediss:// or unix://. It may carry a password: then better by file.
    url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    url_file: Path | None = None
    # Before every key and channel. Replicas with the same one share their sessions.
    prefix: str = Field(default="muster:", pattern=r"^[A-Za-z0-9:._-]{0,64}$")
    # For how long changes are merged before they are written; below the default interval of a watch.
    flush_seconds: float = Field(default=0.03, ge=0, le=10)
    # Between two signs of life. A replica that missed five is believed dead, and its sessions are taken over.
    beat_seconds: float = Field(default=1.0, gt=0, le=60)
    replica_life_seconds: float = Field(default=5.0, gt=0, le=600)

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.replica_life_seconds < 2 * self.beat_seconds:
            raise ValueError("replica_life_seconds must be at least twice beat_seconds")
        return self

    def resolved_url(self) -> str:
        """Returns the URL.

        Raises:
            StartupError: its file cannot be read.
        """
        return read_secret(self.url_file) if self.url_file else self.url.get_secret_value()


class CheckpointConfig(Section):
    """Important sessions, saved while they run."""

    # How often it is looked which ones are due: what a checkpoint may be later than its session's policy says.
    interval_seconds: float = Field(default=1.0, gt=0, le=60)


class TrackerConfig(ServiceConfig):
    """All settings of the session tracker."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7403")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9403")
    sessions: SessionsConfig = SessionsConfig()
    renewal: RenewalConfig = RenewalConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    # Whose leases are renewed; without a target none are.
    allocator: PeerConfig = PeerConfig()
