"""Policies, runs, archives and cold files."""

from services.migrations import run_sql

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Applies the .sql file of the same name."""
    run_sql(__file__)
