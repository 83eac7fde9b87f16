"""``sightwire events``: the newest events of a Redis, and those that follow."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Collection, Sequence

from stream.errors import ClientError
from stream.following import follow, newest
from stream.received import KINDS, ReceivedEvent
from stream.settings import Settings, home
from stream.sinks.embedded import running_url


async def redis_url(settings: Settings) -> str:
    """The configured Redis, else the embedded server that runs in the home folder.

    Raises ``ClientError`` when there is neither.
    """
    if settings.redis.url is not None:
        return settings.redis.url.get_secret_value()
    url = await running_url(home() / "valkey")
    if url is None:
        raise ClientError("no Redis: give --redis redis://host:port, or start `sightwire run` or `make demo` first")
    return url


async def show_events(
    settings: Settings,
    show: Callable[[ReceivedEvent], None],
    *,
    following: bool,
    kinds: Sequence[str] | None,
    sources: Collection[str] | None,
    last: int,
    prefix: str,
) -> int | None:
    """Show the newest ``last`` events; with ``following`` go on until Ctrl-C. Raises ``ClientError``.

    Gives how many there were, ``None`` after following.
    """
    url = await redis_url(settings)
    wanted = kinds or KINDS
    if not following:
        found = await newest(url, kinds=wanted, sources=sources, prefix=prefix, count=last)
        for event in found:
            show(event)
        return len(found)
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("show_events needs a task")
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        async for event in follow(url, kinds=wanted, sources=sources, prefix=prefix, backlog=last):
            show(event)
    except asyncio.CancelledError:
        pass
    return None
