"""A client of a running service's HTTP interface, for the command line."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from stream.errors import SightwireError, no_connection

TIMEOUT_S = 30.0
"""Longer than any answer takes: a source that is removed may need some seconds to end."""


class ApiError(SightwireError):
    """The service cannot be reached, or refuses."""


class Api:
    """Calls to one service. ``base`` is its address, ``token`` its bearer token where it wants one."""

    def __init__(self, base: str, token: str | None = None) -> None:
        """Raises ``ApiError`` for an address that is none of HTTP."""
        if urllib.parse.urlsplit(base).scheme not in ("http", "https"):
            raise ApiError(f"{base} is no address of a service; give one like http://127.0.0.1:9464")
        self._base = base.rstrip("/")
        self._headers = {"Accept": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON; ``None`` where it has no content. Raises ``ApiError`` in the service's own words."""
        headers, data = dict(self._headers), None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ApiError(_reason(error)) from None
        except (OSError, ValueError) as error:
            reason = no_connection(error) or getattr(error, "reason", None) or error
            raise ApiError(
                f"no service at {self._base} ({reason}); start `sightwire run`, or give --api its address"
            ) from None
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise ApiError(f"{self._base} is no Sightwire service; give --api its address") from None


def quoted(name: str) -> str:
    """A name as part of a path."""
    return urllib.parse.quote(name, safe="")


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        said = json.loads(error.read())["detail"]
    except (ValueError, KeyError, TypeError, OSError):
        said = error.reason
    if error.code == 401:
        return "the service wants its token; set SIGHTWIRE_HTTP__TOKEN"
    return said if isinstance(said, str) else f"{error.code} {error.reason}: {json.dumps(said)}"
