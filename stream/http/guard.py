"""Keeps web pages from using somebody's browser against a service that listens on their machine.

A service on a loopback address needs no token, and a browser on that machine can reach it on behalf of any page it
shows. So what changes something is refused there unless the browser says that it comes from the service's own pages
(``Origin``), and unless the service was called by a loopback name: a page may point a name of its own at 127.0.0.1
(DNS rebinding). Bodies must be JSON, which a page of another origin cannot send without being asked first.
With a token host and origin do not matter, as no browser has it; programs send no ``Origin`` and notice nothing.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import HTTPException, Request

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
API = "/v1/"
"""What is guarded: other protocols (WHIP) have rules of their own."""


def check_change(request: Request, *, has_token: bool) -> None:
    """Refuse a request to change something that a page of another origin may have caused.

    Raises ``HTTPException``: 415 for a body that is no JSON, and without a token 403 by host and origin.
    """
    if request.method in SAFE or not request.url.path.startswith(API):
        return
    if not has_token:
        check_origin(request)
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        _check_json(request)


def check_origin(request: Request) -> None:
    """Refuse what a page of another origin, or of a name that is not this machine's, may have caused: 403."""
    host = request.headers.get("host", "")
    if not _is_loopback(host):
        raise HTTPException(403, f"host {host!r} is not a loopback address; set http.token to allow others")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise HTTPException(403, f"requests of pages from {origin!r} are refused; set http.token to allow them")


def _check_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "the body must be JSON; send Content-Type: application/json")


def _is_loopback(host: str) -> bool:
    """Whether a ``Host`` header names this machine by a name that no page can have."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
