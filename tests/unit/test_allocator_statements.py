"""What every statement of the allocator keeps to, read from its text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import allocator
from services.postgres import queries

FILES = sorted(path.name for path in (Path(allocator.__file__).parent / "sql").glob("*.sql"))


@pytest.mark.parametrize("file", FILES)
def test_no_row_is_locked_under_partitions_that_are_left_out_while_the_statement_runs(file: str) -> None:
    # PostgreSQL 18.6 falls over when such a plan looks again at a row that it waited for and that has moved on.
    for name, statement in queries("allocator", file).items():
        if "UPDATE" in statement:
            assert not re.search(r"\bwork_date = [a-z]+\.work_date", statement), name
