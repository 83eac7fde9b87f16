"""A Redis client for readers that rides out outages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from stream.backoff import Backoff
from stream.errors import ClientError
from stream.sinks.redis_errors import FOREIGN, explain, follow_failover, open_client

log = logging.getLogger(__name__)


class GroupLost(Exception):
    """The consumer group, or its stream, went away (FLUSHALL, a restart without data, XGROUP DESTROY)."""


class PatientConnection:
    """Every call is repeated, with backoff, until the server answers it."""

    def __init__(self, url: str, *, block_s: float, name: str) -> None:
        """Nothing is connected yet. Raises ``ClientError`` when the URL is not one."""
        # A blocking read is silent for as long as it blocks: the socket must wait longer.
        try:
            self.redis: Redis = open_client(url, timeout_s=block_s + 3.0, connect_timeout_s=3.0, name=name)
        except ValueError:
            # The cause may quote the password.
            raise ClientError("not a Redis address; use redis://:password@host:port/db") from None
        self._url = url
        self._backoff = Backoff()
        self._reached = False
        self.losses = 0
        """Calls that had to be repeated; a reply to them may have got lost."""

    async def call(self, command: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Result of a command of ``redis``.

        Raises ``ClientError`` when repeating can't help, or when the server was never reached; ``GroupLost``.
        """
        failures = 0
        while True:
            try:
                result = await command(*args, **kwargs)
            except FOREIGN as error:
                if isinstance(error, ResponseError) and str(error).startswith(("NOGROUP", "UNBLOCKED")):
                    raise GroupLost from None
                failures += 1
                self.losses += 1
                await self._wait_after(error, failures)
            else:
                self._reached = True
                return result

    async def _wait_after(self, error: Exception, failures: int) -> None:
        failure = explain(error, self._url)
        if not failure.retryable or not self._reached:
            raise ClientError(failure.message) from None
        await follow_failover(failure, self.redis)
        if failures == 1:
            log.warning("%s; trying again until it is back", failure.message)
        await asyncio.sleep(self._backoff.delay_s(failures, random.random()))

    async def aclose(self) -> None:
        """Disconnect; idempotent."""
        with contextlib.suppress(*FOREIGN):
            await self.redis.aclose()
