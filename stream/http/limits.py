"""Bounds the bodies of requests, before anything reads them whole."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 1 << 20
"""Bytes; a source with as many regions and corners as it may have is well below."""


class BodyLimit:
    """Answers 413 to a request whose body is longer, whether it says so or not."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                # Raised where the body is read, below what turns it into an answer.
                raise HTTPException(413, f"the body is longer than {self._limit} bytes", {"Connection": "close"})
            return message

        await self._app(scope, bounded, send)
