"""Fixtures of every test: the real parts they run against. Each names itself in the report's header."""

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.redis",
    "tests.support.s3",
    "tests.support.services",
    "tests.support.house",
]
