"""Logs: one JSON object a line on stderr, with the request id of the call in hand."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from services.call import current
from services.config import LogConfig

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(config: LogConfig, service: str) -> None:
    """Sets up structlog for this process, and routes the standard library's warnings through it."""

    def add_context(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        try:
            call = current()
        except LookupError:
            return event
        event.setdefault("request", call.request_id)
        if call.traceparent:
            event.setdefault("traceparent", call.traceparent)
        return event

    renderers: list[Any]
    if config.format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            add_context,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.captureWarnings(True)
    handler = _Forward()
    logging.basicConfig(level=max(_LEVELS[config.level], logging.WARNING), handlers=[handler], force=True)


class _Forward(logging.Handler):
    """Hands the standard library's records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
