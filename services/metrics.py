"""Prometheus metrics on a port of their own, and the event loop's lag."""

from __future__ import annotations

import asyncio
import time
from wsgiref.simple_server import WSGIServer

from prometheus_client import Gauge, Histogram, start_http_server

from services.config import MetricsConfig
from services.errors import StartupError

LOOP_LAG = Histogram(
    "muster_event_loop_lag_seconds",
    "How much later than asked the event loop woke a timer; sampled twice a second.",
    buckets=(0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5),
)
BUILD = Gauge("muster_build_info", "Always 1; the labels say what runs.", ["service", "version"])

_SAMPLE_SECONDS = 0.5


def split_address(listen: str) -> tuple[str, int]:
    """Returns host and port of a `host:port` address."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def serve(config: MetricsConfig) -> tuple[WSGIServer, str]:
    """Serves `/metrics` from a thread; returns the server and the address it listens on.

    Raises:
        StartupError: the port is taken or not allowed.
    """
    host, port = split_address(config.listen)
    try:
        server, _ = start_http_server(port, addr=host)
    except OSError as error:
        raise StartupError(
            f"the metrics port {config.listen} cannot be used ({error.strerror or error}): "
            "stop what uses it, or set metrics.listen"
        ) from None
    return server, f"{host}:{server.server_port}"


async def watch_loop_lag() -> None:
    """Samples the event loop's lag for ever."""
    while True:
        asked = time.perf_counter() + _SAMPLE_SECONDS
        await asyncio.sleep(_SAMPLE_SECONDS)
        LOOP_LAG.observe(max(0.0, time.perf_counter() - asked))
