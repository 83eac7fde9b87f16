"""Looking on at events: the newest of a Redis, and those that follow, without a consumer group."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from stream.errors import ClientError
from stream.received import KINDS, ReceivedEvent, parse_entry
from stream.reconnect import PatientConnection
from stream.sinks.redis import stream_key

log = logging.getLogger(__name__)

_LOOK_BACK = 2000
"""Entries of a stream that are looked through for the newest of some sources."""


async def follow(
    url: str,
    *,
    kinds: Sequence[str] = KINDS,
    sources: Collection[str] | None = None,
    prefix: str = "sightwire",
    backlog: int = 0,
    block_s: float = 1.0,
) -> AsyncIterator[ReceivedEvent]:
    """Events as they come, after the newest ``backlog`` ones; for looking on, without a group.

    Rides out restarts of the server. Raises ``ClientError`` when the server cannot be reached at first, or
    refuses for good.
    """
    connection = PatientConnection(url, block_s=block_s, name="sightwire-follow")
    wanted = None if sources is None else frozenset(sources)
    try:
        old, after = await _newest(connection, stream_keys(prefix, kinds), wanted, backlog)
        for event in old:
            yield event
        block_ms = max(1, int(block_s * 1000))
        while True:
            reply = await connection.call(connection.redis.xread, dict(after), count=256, block=block_ms)
            for stream, entries in reply:
                after[stream] = entries[-1][0]
                for event in _events(stream, entries, wanted):
                    yield event
    finally:
        await connection.aclose()


async def newest(
    url: str,
    *,
    kinds: Sequence[str] = KINDS,
    sources: Collection[str] | None = None,
    prefix: str = "sightwire",
    count: int = 20,
) -> list[ReceivedEvent]:
    """The newest ``count`` events, oldest first, without waiting for more.

    Raises ``ClientError`` when the server cannot be reached at first, or
    refuses for good.
    """
    connection = PatientConnection(url, block_s=1.0, name="sightwire-newest")
    wanted = None if sources is None else frozenset(sources)
    try:
        return (await _newest(connection, stream_keys(prefix, kinds), wanted, count))[0]
    finally:
        await connection.aclose()


async def _newest(
    connection: PatientConnection, streams: Sequence[str], wanted: frozenset[str] | None, count: int
) -> tuple[list[ReceivedEvent], dict[str, str]]:
    """The newest ``count`` events over all streams, oldest first, and each stream's last entry id."""
    after: dict[str, str] = {}
    old: list[ReceivedEvent] = []
    # Only some of the entries may be of a wanted source, so more are looked at than are asked for.
    looked_at = max(count, 1) if wanted is None else _LOOK_BACK
    for stream in streams:
        entries = await connection.call(connection.redis.xrevrange, stream, count=looked_at)
        after[stream] = entries[0][0] if entries else "0-0"
        old.extend(_events(stream, entries, wanted))
    return sorted(old, key=lambda event: entry_time(event.entry_id))[len(old) - min(count, len(old)) :], after


def _events(stream: str, entries: Any, wanted: frozenset[str] | None) -> list[ReceivedEvent]:
    """The events among entries; others are logged and passed over."""
    events = []
    for entry_id, fields in entries:
        try:
            event = parse_entry(stream, entry_id, fields)
        except ValueError as error:
            log.warning("%s", error)
            continue
        if wanted is None or event.source_id in wanted:
            events.append(event)
    return events


def entry_time(entry_id: str) -> tuple[int, int]:
    """An entry's id for comparison: the server's milliseconds, and a count within one."""
    first, _, second = entry_id.partition("-")
    return int(first), int(second or 0)


def stream_keys(prefix: str, kinds: Sequence[str]) -> list[str]:
    """The streams of these kinds of event. Raises ``ClientError`` for an unknown one."""
    if unknown := set(kinds) - set(KINDS):
        raise ClientError(f"no such kind of event: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return [stream_key(prefix, kind) for kind in kinds]
