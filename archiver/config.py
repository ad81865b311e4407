"""The archiver's settings."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field

from services.config import GrpcConfig, MetricsConfig, PostgresConfig, Section, ServiceConfig
from services.objects import ObjectStoreConfig


def _cron(value: str) -> str:
    try:
        next(CronSim(value, datetime(2026, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration) as error:
        raise ValueError(f"must be a cron expression of five fields, such as 0 3 * * * ({error})") from None
    return value


def _time_zone(value: str) -> str:
    if value not in available_timezones():
        raise ValueError("must be an IANA time zone, such as Asia/Seoul")
    return str(ZoneInfo(value))


Cron = Annotated[str, AfterValidator(_cron)]


class ScheduleConfig(Section):
    """When the jobs run: cron expressions, read in `time_zone`."""

    partitions: Cron = "0 2 * * *"
    archive: Cron = "0 3 * * *"
    time_zone: Annotated[str, AfterValidator(_time_zone)] = "UTC"


class QueryConfig(Section):
    """What one query may use beside the bytes it reads."""

    # Sorts and joins that need more spill to disk.
    memory_bytes: int = Field(default=256 * 2**20, ge=16 * 2**20, le=2**40)


class PolicyConfig(Section):
    """A policy that is put at each start, if it differs from the one that stands; fields as in the contract."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")
    source: str = Field(min_length=1, max_length=63)
    table: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}\.[A-Za-z_][A-Za-z0-9_]{0,62}$")
    interval: Literal["day", "week", "month"]
    ahead: int = Field(default=3, ge=3, le=120)
    hot_retention_days: int = Field(default=0, ge=0, le=36_500)
    cold_retention_days: int = Field(default=0, ge=0, le=36_500)
    legal_hold: bool = False
    key_column: str = Field(default="", max_length=63)
    organization_column: str = Field(default="organization_id", min_length=1, max_length=63)


class ArchiverConfig(ServiceConfig):
    """Everything the archiver can be told."""

    grpc: GrpcConfig = GrpcConfig(listen="127.0.0.1:7404")
    metrics: MetricsConfig = MetricsConfig(listen="127.0.0.1:9404")
    objects: ObjectStoreConfig = ObjectStoreConfig()
    # The databases that policies may name, each as the role that owns the tables.
    sources: dict[str, PostgresConfig] = Field(default_factory=dict)
    schedule: ScheduleConfig = ScheduleConfig()
    query: QueryConfig = QueryConfig()
    policies: tuple[PolicyConfig, ...] = ()
