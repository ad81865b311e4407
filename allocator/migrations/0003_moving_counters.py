"""Counters that move all day: no unique index on them, room for their versions; doubled days are kept out by locks."""

from services.migrations import run_sql

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Applies the .sql file of the same name."""
    run_sql(__file__)
