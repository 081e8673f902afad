"""Run an application: on a socket that is open before it is told, until a signal, and to the end of what was begun."""

from __future__ import annotations

import gc
import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from vist_rag.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace_s: int = 30,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or ctrl-C; then nobody is let in any more, and what was begun is finished.

    Args:
        app: What :func:`~vist_rag.serving.app.create_app` made.
        host: Address to listen at.
        port: Its port; 0: one that is free.
        grace_s: How long requests in flight may take after a signal.
        started: Called with the server's URL, once clients can connect.
    Raises:
        ConfigError: If nobody can listen there.
        KeyboardInterrupt: After ctrl-C, when all is finished.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        at = f"{host}:{port} ({reason})"
        raise ConfigError(f"host and port must be free to listen at, got {at}; take others.") from error
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace_s
    )
    gc.collect()
    gc.freeze()  # models are not garbage: looking through them again and again takes as long as an answer
    with listening:
        if started is not None:
            shown = f"[{host}]" if ":" in host else host
            started(f"http://{shown}:{listening.getsockname()[1]}")
        # uvicorn sends itself the signal again when it is done, which would end the process as if it had failed.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
