"""Fixtures of every test: the real parts they run against, named once in the report's header."""

from tests.support import postgres, s3

pytest_plugins = ["tests.support.postgres", "tests.support.s3"]


def pytest_report_header() -> list[str]:
    """Say which servers this session uses."""
    return [f"postgresql: {postgres.chosen_server()}", f"s3: {s3.chosen_server()}"]
