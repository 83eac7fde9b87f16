"""Runs the HTTP application inside the service's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from stream.errors import SightwireError
from stream.settings import HttpSettings

log = logging.getLogger(__name__)


class HttpError(SightwireError):
    """The address cannot be bound."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the service, which ends this server in its turn."""
        yield


def bind(settings: HttpSettings) -> socket.socket:
    """A listening socket. Raises ``HttpError`` naming the address and the remedy."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise HttpError(
            f"http: cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "set http.port (0 takes a free one)"
        ) from error
    return listener


@contextlib.asynccontextmanager
async def serving(app: FastAPI, listener: socket.socket) -> AsyncIterator[str]:
    """Serve while the block runs; gives the base URL."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    server = _Server(config)
    host, port = listener.getsockname()[:2]
    task = asyncio.create_task(server.serve([listener]), name="http")
    try:
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await task
