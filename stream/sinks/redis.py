"""Events to Redis Streams, each appended once however often it is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

from stream.errors import EventRejected, SinkError
from stream.sinks.cloudevent import FIELDS, event_fields
from stream.sinks.redis_errors import FOREIGN, explain, follow_failover, open_client
from stream.types import Event

# The id is remembered after the append: should XADD fail, the script ends there and the id is not remembered.
# A script is atomic, in memory and in the append-only file, so no crash can come between the two.
APPEND_ONCE: Final = """\
local new = {}
local width = tonumber(ARGV[3])
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    new[i - 1] = 0
  else
    local first = 4 + (i - 2) * width
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, first, first + width - 1))
    redis.call('SET', KEYS[i], '1', 'EX', ARGV[1])
    new[i - 1] = 1
  end
end
return new
"""
_MOST_GROUPS: Final = 50
"""Bound on what the groups of others may add to the metrics."""
_SHA: Final = hashlib.sha1(APPEND_ONCE.encode(), usedforsecurity=False).hexdigest()


def stream_key(prefix: str, kind: str) -> str:
    """The stream that events of a kind go to."""
    return f"{prefix}:events:{kind}"


def seen_key(prefix: str, kind: str, event_id: str) -> str:
    """The key that remembers an id. The braces put it into the slot of its stream in a Redis Cluster."""
    return f"{prefix}:seen:{{{stream_key(prefix, kind)}}}:{event_id}"


class RedisSink:
    """Appends events to ``{prefix}:events:{kind}``, in order per stream.

    One connection, so that a server that went away and came back is always noticed, by an error.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "sightwire",
        maxlen: int = 100_000,
        dedupe_s: int = 86_400,
        timeout_s: float = 2.0,
        connect_timeout_s: float = 2.0,
    ) -> None:
        """Nothing is connected yet. Raises ``SinkError`` when the URL is not one."""
        if "{" in prefix or "}" in prefix:
            raise SinkError(f"redis.prefix {prefix!r} must not hold braces", retryable=False)
        self._url = url
        self._prefix = prefix
        self._maxlen = maxlen
        self._dedupe_s = dedupe_s
        try:
            self._client: Redis = open_client(
                url, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, name="sightwire-sink", single=True
            )
        except ValueError:
            # The cause may quote the password.
            raise SinkError("not a Redis address; use redis://:password@host:port/db", retryable=False) from None

    async def check(self) -> str:
        """Version of the server, e.g. ``valkey 9.1.2``. Raises ``SinkError`` when events cannot be published to it."""
        try:
            info = await self._client.info("server")
            role = await self._client.info("replication")
        except FOREIGN as error:
            raise self._mapped(error) from None
        if role.get("role") == "slave" and role.get("slave_read_only", 1):
            raise self._mapped(ReadOnlyError())
        # Nothing is appended: whether this user may run the script.
        await self._append("source", [], [])
        return str(info.get("server_name", "redis")) + " " + str(info.get("valkey_version", info.get("redis_version")))

    async def publish(self, events: Sequence[Event]) -> list[bool]:
        """See ``Sink``."""
        fields = [event_fields(event) for event in events]
        by_kind: dict[str, list[int]] = {}
        for position, event in enumerate(events):
            by_kind.setdefault(event.kind, []).append(position)
        new = [False] * len(events)
        for kind, positions in by_kind.items():
            seen = [seen_key(self._prefix, kind, events[position].id) for position in positions]
            flat = [value for position in positions for value in _entry(fields[position])]
            for position, flag in zip(positions, await self._append(kind, seen, flat), strict=True):
                new[position] = bool(flag)
        return new

    async def _append(self, kind: str, seen: list[str], flat: list[str]) -> list[int]:
        arguments: list[Any] = [
            stream_key(self._prefix, kind),
            *seen,
            self._dedupe_s,
            self._maxlen,
            2 * len(FIELDS),
            *flat,
        ]
        keys = 1 + len(seen)
        try:
            try:
                reply = await self._client.evalsha(_SHA, keys, *arguments)
            except NoScriptError:  # a fresh or restarted server; EVAL loads the script too
                reply = await self._client.eval(APPEND_ONCE, keys, *arguments)
        except FOREIGN as error:
            await follow_failover(explain(error, self._url), self._client)
            raise self._mapped(error) from None
        return cast(list[int], reply)

    async def group_lags(self, kinds: Sequence[str]) -> dict[tuple[str, str], int]:
        """Entries that each consumer group has not been given yet, by kind and group; at most ``_MOST_GROUPS``.

        A group whose lag the server cannot tell (entries were deleted) is left out. Raises ``SinkError``.
        """
        lags: dict[tuple[str, str], int] = {}
        for kind in kinds:
            try:
                groups = await self._client.xinfo_groups(stream_key(self._prefix, kind))
            except ResponseError:  # no such stream yet
                continue
            except FOREIGN as error:
                raise self._mapped(error) from None
            lags |= {(kind, str(group["name"])): int(group["lag"]) for group in groups if group.get("lag") is not None}
        return dict(sorted(lags.items())[:_MOST_GROUPS])

    async def aclose(self) -> None:
        """See ``Sink``."""
        try:
            await self._client.aclose()
        except FOREIGN as error:
            raise self._mapped(error) from None

    def _mapped(self, error: Exception) -> SinkError:
        failure = explain(error, self._url)
        if failure.reason == "wrongtype":
            return EventRejected(failure.message)
        return SinkError(failure.message, retryable=failure.retryable, reason=failure.reason)


def _entry(values: tuple[str, ...]) -> list[str]:
    return [part for pair in zip(FIELDS, values, strict=True) for part in pair]
