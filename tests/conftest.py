"""Fixtures of every test: the real parts they run against. Each names itself in the report's header."""

import signal

# A suite that a shell started in the background ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.redis",
    "tests.support.s3",
    "tests.support.services",
    "tests.support.house",
]
