"""Connecting to Redis, and what its exceptions mean; shared by the sink and the client."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from stream.errors import no_connection
from stream.source_settings import redacted_url

FOREIGN = (redis_errors.RedisError, OSError)
"""What redis-py may raise from a command."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What an exception of redis-py means."""

    reason: str
    """Bounded label for metrics."""
    message: str
    """One line for the user: address, cause, remedy."""
    retryable: bool
    """Whether the same command may work later without anybody changing anything."""


def open_client(url: str, *, timeout_s: float, connect_timeout_s: float, name: str, single: bool = False) -> Redis:
    """A client that never retries by itself. Connects at the first command. Raises ``ValueError`` for a bad URL."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 0 if single else 30,
        "retry": Retry(NoBackoff(), 0),
        "client_name": name,
        "protocol": 2,  # one shape of reply from every server version
        "decode_responses": True,
        "encoding_errors": "replace",  # a foreign entry must not stop a reader
        "single_connection_client": single,
    }
    return Redis.from_url(url, **options)


_BY_TYPE: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str, bool, str], ...] = (
    # The first match counts; most of these derive from ConnectionError or ResponseError.
    (
        (redis_errors.AuthenticationError, redis_errors.AuthenticationWrongNumberOfArgsError),
        "auth",
        False,
        "refused the user name or password; check the address's user:password@ part",
    ),
    (
        (redis_errors.NoPermissionError, redis_errors.AuthorizationError),
        "permission",
        False,
        "does not let this user run a command it needs; to publish it needs +info +client|setname +evalsha +eval +xadd "
        "+set +exists on the keys of redis.prefix",
    ),
    (redis_errors.BusyLoadingError, "loading", True, "is still loading its data"),
    (redis_errors.ReadOnlyError, "readonly", True, "is a read-only replica; give the address of the primary"),
    (redis_errors.OutOfMemoryError, "oom", True, "is out of memory; raise maxmemory or lower redis.maxlen"),
    (
        (redis_errors.ClusterDownError, redis_errors.MasterDownError, redis_errors.TryAgainError),
        "cluster_down",
        True,
        "says that its cluster or its primary is down",
    ),
    (
        (redis_errors.AskError, redis_errors.ClusterCrossSlotError),
        "cluster",
        False,
        "is a node of a cluster that does not hold this key; give the address of the node that does, or of a proxy",
    ),
    (
        redis_errors.TimeoutError,
        "timeout",
        True,
        "did not answer in time; check the address, and rediss:// for TLS or redis:// without",
    ),
    (redis_errors.InvalidResponse, "protocol", False, "does not speak the Redis protocol; check the address"),
    (
        (redis_errors.ConnectionError, OSError),
        "connection",
        True,
        "cannot be reached; check the address, and that it runs",
    ),
)

_BY_CODE = {
    "MISCONF": ("misconf", True, "refuses writes because it cannot save to its disk"),
    "NOREPLICAS": ("noreplicas", True, "refuses writes because too few replicas are in reach"),
    "DB index": ("database", False, "has no database of that number; correct the one at the end of the address"),
    "BUSY": ("busy", True, "is busy running a script"),
    "WRONGTYPE": ("wrongtype", False, "holds something that is not a stream under this key; use another redis.prefix"),
}


_NOT_PRIMARY = ("readonly", "cluster_down")


def explain(error: Exception, url: str) -> Failure:
    """What an exception of redis-py (one of ``FOREIGN``) means; the URL's password stays out of it."""
    where = f"Redis at {redacted_url(url)}"
    for kinds, reason, retryable, text in _BY_TYPE:
        if isinstance(error, kinds):
            if reason == "connection" and (why := no_connection(error)) is not None:
                text = text.replace(";", f" ({why});", 1)
            elif reason not in ("auth", "timeout"):
                text += _detail(error)
            return Failure(reason, f"{where} {text}", retryable)
    code = next((code for code in _BY_CODE if code in str(error)), None)
    if code is not None:
        reason, retryable, text = _BY_CODE[code]
        return Failure(reason, f"{where} {text}", retryable)
    return Failure("other", f"{where} refused a command{_detail(error)}", retryable=False)


async def follow_failover(failure: Failure, client: Redis) -> None:
    """After a failover the address may lead to another server, while the connection still leads to the old one."""
    if failure.reason in _NOT_PRIMARY:
        with contextlib.suppress(*FOREIGN):
            await client.connection_pool.disconnect()


def _detail(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f" ({text[:200]})" if text else ""
