"""The persona store's settings."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from services.config import GrpcConfig, MetricsConfig, Section, ServiceConfig
from services.objects import ObjectStoreConfig


class CheckOutsConfig(Section):
    """How check-outs are gathered, and how often those that ran out are swept (they count as free at once anyway)."""

    batch_items: int = Field(default=256, ge=1, le=1024)
    # Above this many waiting items a call is refused: at 5,000 a second it is what one second can clear.
    waiting_items: int = Field(default=4096, ge=1, le=100_000)
    sweep_seconds: float = Field(default=1.0, gt=0, le=60)


class BundlesConfig(Section):
    """How many generations are kept, and when what is not needed leaves the object store."""

    generations_kept: int = Field(default=5, ge=1, le=100)
    # The longest that the objects of one save may take to write.
    save_seconds: float = Field(default=300.0, gt=0, le=3600)
    # How long an object stays after the last generation with it was dropped, and how long a save may be unfinished.
    # Readers of an old generation are safe for this long.
    grace_seconds: float = Field(default=3600.0, ge=1, le=30 * 86400)
    collect_seconds: float = Field(default=60.0, gt=0, le=86400)

    @model_validator(mode="after")
    def _grace_covers_a_save(self) -> Self:
        # A put that was given up may still arrive; it must find its announcement, or nobody would ever collect it.
        if self.grace_seconds < 2 * self.save_seconds:
            raise ValueError("grace_seconds must be at least twice save_seconds")
        return self


class PersonaStoreConfig(ServiceConfig):
    """All of it."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7402")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9402")
    objects: ObjectStoreConfig = ObjectStoreConfig()
    check_outs: CheckOutsConfig = CheckOutsConfig()
    bundles: BundlesConfig = BundlesConfig()
