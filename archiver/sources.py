"""The databases that policies name: sessions on them, and where bulk reads connect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from archiver.errors import TableUnsuitable
from services.config import PostgresConfig
from services.postgres import as_unavailable, is_unavailable

if TYPE_CHECKING:
    from services.postgres import Connection

# What the text form of values, and of partition bounds, depends on.
_SETTINGS = {
    "application_name": "muster archiver",
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "1",
    "bytea_output": "hex",
}


class Sources:
    """The configured databases, by name. They are reached when they are needed: one that is away stops no other.

    Args:
        configs: Where each is.

    Raises:
        StartupError: a DSN cannot be read.
    """

    def __init__(self, configs: Mapping[str, PostgresConfig]) -> None:
        self._dsns = {name: config.resolved_dsn() for name, config in configs.items()}
        self._timeouts = {name: config.connect_timeout_seconds for name, config in configs.items()}

    def knows(self, name: str) -> bool:
        """Whether a source is configured."""
        return name in self._dsns

    def dsn(self, name: str) -> str:
        """Returns the URI of a source.

        Raises:
            TableUnsuitable: it is not configured.
        """
        if name not in self._dsns:
            known = ", ".join(sorted(self._dsns)) or "none"
            raise TableUnsuitable(f"the source {name!r} is not configured; known: {known}", source=name)
        return self._dsns[name]

    @asynccontextmanager
    async def session(self, name: str) -> AsyncIterator[Connection]:
        """A connection of its own, whose locks last exactly as long as it does.

        Raises:
            TableUnsuitable: the source is not configured.
            DatabaseUnavailable: it does not answer.
        """
        dsn = self.dsn(name)
        try:
            connection = await asyncpg.connect(dsn, timeout=self._timeouts[name], server_settings=_SETTINGS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            raise as_unavailable(error) from error
        try:
            yield connection
        except asyncpg.PostgresError as error:
            if is_unavailable(error):
                raise as_unavailable(error) from error
            raise
        finally:
            # A polite close would wait for a statement that a cancelled caller left behind.
            connection.terminate()
