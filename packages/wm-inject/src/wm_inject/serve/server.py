"""A service on a socket: uvicorn, with limits on time and connections."""

from __future__ import annotations

import importlib.util
import logging
import signal
import socket
import time
from typing import Any

import uvicorn

from wm_inject.serve.app import Service, log_line

_BACKLOG = 1024


def make_server(service: Service) -> tuple[uvicorn.Server, socket.socket]:
    """A server that has not started yet, and its socket, which listens already.

    Raises:
        ValueError: The address cannot be listened on.
    """
    settings = service.settings
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server(
            (settings.host, settings.port), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        raise ValueError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}"
        ) from None
    waiting: dict[Any, float] = {}

    async def sweep() -> None:
        """Close connections whose request has not even a whole head in time; uvicorn waits."""
        now = time.monotonic()
        idle = [c for c in server.server_state.connections if _is_headless(c)]
        kept = {connection: waiting.get(connection, now) for connection in idle}
        waiting.clear()
        waiting.update(kept)
        for connection, since in kept.items():
            if now - since > settings.request_timeout:
                connection.transport.close()

    fast = importlib.util.find_spec("httptools") is not None
    server = uvicorn.Server(
        uvicorn.Config(
            service,
            http="httptools" if fast else "h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=max(1, round(settings.stop_timeout)),
            callback_notify=sweep,
            timeout_notify=1,
        )
    )
    return server, listening


def run_server(service: Service) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Raises:
        ValueError: The address cannot be listened on.
    """
    server, listening = make_server(service)
    logging.getLogger("uvicorn.error").addFilter(_to_line)
    # uvicorn stops on the signal and then raises it again for outer handlers.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    host, port = listening.getsockname()[:2]
    log_line("listening", host=host, port=port, models=sorted(service.models))
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
    log_line("stopped")


def _is_headless(connection: Any) -> bool:
    """Whether a connection neither works on a request nor waits for the next with a time limit."""
    cycle = getattr(connection, "cycle", None)
    at_rest = cycle is None or cycle.response_complete
    return at_rest and getattr(connection, "timeout_keep_alive_task", None) is None


def _to_line(record: logging.LogRecord) -> bool:
    """Write what uvicorn has to say as a line like all others."""
    if record.levelno >= logging.WARNING:
        cause = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        log_line("server", level=record.levelname, text=record.getMessage()[:500], cause=cause)
    return False
