"""Fixtures of every test: the real parts they run against. Each names itself in the report's header."""

import signal

# A suite that a shell started in the background ignores Ctrl-C, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup the same holds of the end of a terminal. A program started anew forgets a handler but not that a signal is
# ignored, so this hands on the default and keeps the suite itself running.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.redis",
    "tests.support.s3",
    "tests.support.services",
    "tests.support.house",
]
