"""Checkpoints of important sessions, and results by client."""

from services.migrations import run_sql

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Applies the .sql file of the same name."""
    run_sql(__file__)
