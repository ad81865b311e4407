"""Classes of slots, pacing, politeness, exit cap modes and health, external exits, audit."""

from services.migrations import run_sql

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Applies the .sql file of the same name."""
    run_sql(__file__)
