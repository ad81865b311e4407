"""Typed configuration from one TOML file and the environment; an unknown key is fatal.

A service's settings stand in its own table of the file (``[allocator]``) and in environment variables named after it
(``MUSTER_ALLOCATOR__GRPC__LISTEN``), which win. Secrets are given by file path or by environment, never logged.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from services.errors import StartupError

# The tables a file may have. One file serves the whole suite, so a service meets the tables of the others.
SECTIONS = ("allocator", "persona_store", "session_tracker", "archiver", "launcher")

_LISTEN = re.compile(r"(?P<host>[^\s:/]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})\Z")


def _listen_address(value: str) -> str:
    match = _LISTEN.match(value)
    if match is None or not int(match["port"]) <= 65535:
        raise ValueError("must be host:port, with port 0 for any free one")
    return value


ListenAddress = Annotated[str, AfterValidator(_listen_address)]


class Section(BaseModel):
    """A table of the configuration: frozen, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GrpcConfig(Section):
    """The gRPC port."""

    listen: ListenAddress = "127.0.0.1:0"
    # Covers the largest message of the contracts, an inline bundle of 3 MiB, with room to spare.
    max_message_bytes: int = Field(default=8 * 2**20, ge=2**16, le=2**30)
    reflection: bool = True
    channelz: bool = True


class MetricsConfig(Section):
    """The Prometheus port."""

    listen: ListenAddress = "127.0.0.1:0"


class PostgresConfig(Section):
    """A database: its libpq URI, given directly, or by the path of a file that holds nothing else."""

    dsn: SecretStr = SecretStr("")
    dsn_file: Path | None = None
    pool_min: int = Field(default=1, ge=0, le=1000)
    # The documents' bound is 100 connections over all; four services at 10 leave room for replicas and operators.
    pool_max: int = Field(default=10, ge=1, le=1000)
    idle_timeout_seconds: float = Field(default=60.0, gt=0)
    connect_timeout_seconds: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dsn.get_secret_value() and self.dsn_file:
            raise ValueError("set dsn or dsn_file, not both")
        return self

    def resolved_dsn(self) -> str:
        """Returns the URI.

        Raises:
            StartupError: none is set, or its file cannot be read.
        """
        if self.dsn_file:
            return read_secret(self.dsn_file)
        if not self.dsn.get_secret_value():
            raise StartupError("no database is named: set postgres.dsn or postgres.dsn_file, or use `muster up`")
        return self.dsn.get_secret_value()


class DrainConfig(Section):
    """How the service stops: `delay_seconds` not ready, for balancers to notice, then `grace_seconds` for calls."""

    delay_seconds: float = Field(default=0.0, ge=0, le=300)
    grace_seconds: float = Field(default=10.0, ge=0, le=300)


class LogConfig(Section):
    """What is logged and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"


class PeerConfig(Section):
    """Another service of the suite: its gRPC target, and the file with the key of role `service` to call it with."""

    target: str = ""
    key_file: Path | None = None


class ServiceConfig(BaseSettings):
    """What every service can be told. Services add their own tables by subclassing."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_nested_delimiter="__", env_ignore_empty=True)

    grpc: GrpcConfig = GrpcConfig()
    metrics: MetricsConfig = MetricsConfig()
    postgres: PostgresConfig = PostgresConfig()
    # Where organizations and API keys stand; unset means the service's own database.
    identity: PostgresConfig = PostgresConfig(pool_min=0, pool_max=2)
    drain: DrainConfig = DrainConfig()
    log: LogConfig = LogConfig()
    event_loop: Literal["uvloop", "asyncio"] = "uvloop"

    def identity_database(self) -> PostgresConfig:
        """Returns where organizations and API keys stand: `identity`, or the service's own when it names none."""
        if self.identity.dsn.get_secret_value() or self.identity.dsn_file:
            return self.identity
        return self.identity.model_copy(update={"dsn": self.postgres.dsn, "dsn_file": self.postgres.dsn_file})


Config = TypeVar("Config", bound=ServiceConfig)


def load(cls: type[Config], section: str, file: Path | None, environ: Mapping[str, str] | None = None) -> Config:
    """Returns the settings of one service.

    Args:
        cls: The service's configuration class.
        section: Its table in the file and its name in environment variables.
        file: A TOML file; None for none.
        environ: The environment; None means the process's own.

    Raises:
        StartupError: the file is missing or malformed, a key is unknown, or a value is wrong; names all of them.
    """
    variables = os.environ if environ is None else environ
    values = _table(file, section) if file else {}
    prefix = f"MUSTER_{section.upper()}__"
    given = {name.upper().removeprefix(prefix) for name in variables if name.upper().startswith(prefix)}
    unknown = [name for name in given if name.split("__")[0].lower() not in cls.model_fields]
    if unknown:
        names = ", ".join(prefix + name for name in sorted(unknown))
        raise StartupError(f"unknown settings in the environment: {names}: remove or correct them")

    class FromHere(cls):  # type: ignore[valid-type, misc]
        """The class with the environment that was given; it wins over the file, whose values are the arguments."""

        @classmethod
        def settings_customise_sources(cls, settings_cls: type[BaseSettings], **sources: Any) -> tuple[Any, ...]:
            env = EnvSettingsSource(settings_cls, env_prefix=prefix, case_sensitive=False)
            env.env_vars = {name.lower(): value for name, value in variables.items() if value}
            return env, sources["init_settings"]

    try:
        loaded = FromHere(**values)
    except ValidationError as error:
        where = f"{file}, table [{section}]" if file else f"environment {prefix}*"
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {_plain(fault['type'], fault['msg'])}"
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise StartupError(f"configuration ({where}): {faults}") from None
    return loaded


def read_secret(path: Path) -> str:
    """Returns the contents of a secret's file without the line end.

    Raises:
        StartupError: the file cannot be read, or is empty.
    """
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read the secret in {path}: {error}") from None
    if not secret:
        raise StartupError(f"the secret's file {path} is empty: write the secret into it")
    return secret


def _plain(kind: str, message: str) -> str:
    return "unknown key" if kind == "extra_forbidden" else message


def _table(file: Path, section: str) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"cannot read the configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"the configuration file {file} is not TOML: {error}") from None
    strangers = sorted(set(tables) - set(SECTIONS))
    if strangers:
        raise StartupError(
            f"the configuration file {file} has unknown tables: {', '.join(strangers)}; known: {', '.join(SECTIONS)}"
        )
    table = tables.get(section, {})
    if not isinstance(table, dict):
        raise StartupError(f"the configuration file {file}: {section} must be a table")
    return table
