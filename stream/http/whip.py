"""Publishing over WebRTC: the WebRTC-HTTP ingestion protocol (WHIP, RFC 9725).

``POST /whip/{source}`` takes an SDP offer and answers it; the session it makes is named by ``Location``, where PATCH
adds ICE candidates and DELETE ends it. What ICE restarts would need aiortc does not have: they are refused with 422, as
the RFC has it for servers that take one kind of PATCH only.

A token guards each source: its own (``publish_token``), or the service's. Where there is neither, only programs and
pages of this very service on a loopback address may publish (see ``guard``).
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPMethod
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from stream.accounting import Ledger
from stream.clock import Clock
from stream.http.guard import check_origin
from stream.ingest.webrtc_hub import NotExpected, Publications
from stream.settings import HttpSettings, IceServer, Settings, WebRtcSettings
from stream.sources import RunningSource, Sources
from stream.supervisor import SourceState

if TYPE_CHECKING:
    from stream.ingest.webrtc_session import Session

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"
OFFER_BYTES = 64 << 10
"""Longest offer: a browser's is about 8 KB."""
FRAGMENT_BYTES = 16 << 10
"""Longest fragment."""
SESSIONS_LIMIT = 64
"""Sessions at a time, those included that are ending."""
PUBLISH_METHODS = "POST, OPTIONS"
SESSION_METHODS = "PATCH, DELETE, OPTIONS"
_SHUT = (SourceState.PAUSED, SourceState.ENDED, SourceState.FAILED)
"""States in which nobody waits for a publisher."""
Handler = Callable[[Request], Awaitable[Response]]


class Whip:
    """The sessions of one service, and the routes that lead to them."""

    def __init__(
        self,
        sources: Sources,
        publications: Publications,
        settings: Settings,
        clock: Clock,
        ledger: Ledger,
    ) -> None:
        self._sources = sources
        self._publications = publications
        self._settings = settings.webrtc
        self._token = None if settings.http.token is None else settings.http.token.get_secret_value()
        self._addresses = receiving_addresses(settings.webrtc, settings.http)
        self._clock = clock
        self._ledger = ledger
        self._sessions: dict[tuple[str, str], Session] = {}
        self._unnamed: set[Session] = set()
        self._links = [link for server in settings.webrtc.ice_servers for link in ice_links(server)]

    @property
    def count(self) -> int:
        """Sessions that are there, those included that are not yet named or already ending."""
        return len(self._sessions) + len(self._unnamed)

    async def aclose(self) -> None:
        """End all sessions."""
        sessions = [*self._sessions.values(), *self._unnamed]
        await asyncio.gather(*(session.aclose(detail="the service ends") for session in sessions))

    def router(self) -> APIRouter:
        """The routes; they check tokens themselves."""
        router = APIRouter(prefix="/whip")
        source, session = "/{source_id}", "/{source_id}/{session_id}"
        router.add_api_route(source, self._route(self._publish), methods=["POST"])
        router.add_api_route(session, self._route(self._trickle), methods=["PATCH"])
        router.add_api_route(session, self._route(self._end), methods=["DELETE"])
        for path, allowed in ((source, PUBLISH_METHODS), (session, SESSION_METHODS)):
            router.add_api_route(path, self._route(self._options), methods=["OPTIONS"])
            # The framework's own answer would name the first route's methods only.
            others = [method.value for method in HTTPMethod if method not in allowed.split(", ")]
            router.add_api_route(path, self._route(_not_allowed(allowed)), methods=others)
        return router

    def _route(self, handler: Handler) -> Handler:
        """Refusals too must be readable by the page that is refused."""

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HTTPException as refusal:
                headers = {**self._cors(request), **(refusal.headers or {})}
                raise HTTPException(refusal.status_code, refusal.detail, headers) from None

        return handle

    async def _publish(self, request: Request) -> Response:
        """Answer an offer."""
        source_id = self._authorise(request)
        self._source(source_id)
        offer = await read_body(request, SDP, OFFER_BYTES)
        if self._publications.is_taken(source_id):
            raise HTTPException(409, f"source {source_id} is being published to already; end that session first")
        try:
            self._check_waits(source_id)
        except NotExpected as error:
            raise HTTPException(409, str(error)) from None
        if self.count >= SESSIONS_LIMIT:
            raise HTTPException(503, "too many publishers; try again later", {"Retry-After": "10"})
        session_id, session, answer = await self._open(source_id, offer)
        headers = self._cors(request) | {"Location": f"/whip/{source_id}/{session_id}", "ETag": f'"{session.etag}"'}
        response = Response(answer, 201, headers, SDP)
        for link in self._links:
            response.headers.append("Link", link)
        return response

    async def _open(self, source_id: str, offer: str) -> tuple[str, Session, str]:
        from stream.ingest.webrtc_sdp import BadOffer, UnusableOffer
        from stream.ingest.webrtc_session import Session

        session = Session(source_id, self._settings, self._addresses, self._clock, self._ledger, self._ended)
        self._unnamed.add(session)
        try:
            answer = await session.answer(offer)
            assert session.inbox is not None
            # Again: addresses are gathered meanwhile, and servers asked for them.
            self._check_waits(source_id)
            self._publications.offer(source_id, session.inbox)
        except BadOffer as error:
            await session.aclose()
            raise HTTPException(400, str(error)) from None
        except UnusableOffer as error:
            await session.aclose()
            raise HTTPException(422, str(error)) from None
        except NotExpected as error:
            await session.aclose()
            raise HTTPException(409, str(error)) from None
        except asyncio.CancelledError:
            await session.aclose()
            raise
        session_id = secrets.token_urlsafe(24)
        if session in self._unnamed:
            self._unnamed.discard(session)
            self._sessions[source_id, session_id] = session
        return session_id, session, answer

    async def _trickle(self, request: Request) -> Response:
        """Add candidates."""
        from stream.ingest.webrtc_sdp import BadOffer, UnusableOffer
        from stream.ingest.webrtc_session import IceRestart

        session = self._session(self._authorise(request), request)
        body = await read_body(request, FRAGMENT, FRAGMENT_BYTES)
        wanted = request.headers.get("if-match")
        if wanted is None:
            raise HTTPException(428, "If-Match is needed: the ETag of the session")
        if wanted.strip() != "*" and f'"{session.etag}"' not in [tag.strip() for tag in wanted.split(",")]:
            raise HTTPException(412, "the ETag is not that of the session")
        try:
            await session.trickle(body)
        except BadOffer as error:
            raise HTTPException(400, str(error)) from None
        except (UnusableOffer, IceRestart) as error:
            raise HTTPException(422, str(error)) from None
        return Response(status_code=204, headers=self._cors(request))

    async def _end(self, request: Request) -> Response:
        """End a session."""
        await self._session(self._authorise(request), request).aclose()
        return Response(status_code=200, headers=self._cors(request))

    async def _options(self, request: Request) -> Response:
        """What may be sent here; a browser asks before it lets a page publish."""
        of_session = "session_id" in request.path_params
        headers = self._cors(request) | ({"Accept-Patch": FRAGMENT} if of_session else {"Accept-Post": SDP})
        headers["Allow"] = SESSION_METHODS if of_session else PUBLISH_METHODS
        if "Access-Control-Allow-Origin" in headers:
            headers["Access-Control-Allow-Methods"] = headers["Allow"]
            headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, If-Match"
            headers["Access-Control-Max-Age"] = "600"
        return Response(status_code=204, headers=headers)

    def _ended(self, session: Session) -> None:
        """Nothing is left of a session."""
        if session.inbox is not None:
            self._publications.withdraw(session.source_id, session.inbox)
            session.inbox.release()
        self._unnamed.discard(session)
        self._sessions = {key: other for key, other in self._sessions.items() if other is not session}

    def _tokens(self, source_id: str) -> list[str]:
        source = self._sources.get(source_id)
        own = None if source is None else source.settings.publish_token
        return [token for token in (self._token, None if own is None else own.get_secret_value()) if token is not None]

    def _authorise(self, request: Request) -> str:
        """The source that is meant, by somebody who may publish to it. Raises ``HTTPException`` 401 or 403."""
        source_id: str = request.path_params["source_id"]
        tokens = self._tokens(source_id)
        if not tokens:
            check_origin(request)
            return source_id
        given = request.headers.get("authorization", "").encode()
        if not any([secrets.compare_digest(given, f"Bearer {token}".encode()) for token in tokens]):
            raise HTTPException(401, "a bearer token is needed to publish", {"WWW-Authenticate": "Bearer"})
        return source_id

    def _cors(self, request: Request) -> dict[str, str]:
        """Lets pages of any origin in where a token guards: no browser adds one by itself."""
        if not self._tokens(request.path_params["source_id"]):
            return {}
        return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Location, ETag, Link"}

    def _source(self, source_id: str) -> RunningSource:
        source = self._sources.get(source_id)
        if source is None or source.settings.scheme != "webrtc":
            raise HTTPException(404, "there is no source of that name whose url is webrtc://")
        if importlib.util.find_spec("aiortc") is None:
            raise HTTPException(501, "aiortc is not installed; pip install 'sightwire[webrtc]'")
        return source

    def _check_waits(self, source_id: str) -> None:
        """Raises ``NotExpected`` where nobody waits for a publisher."""
        source = self._sources.get(source_id)
        state = SourceState.ENDED if source is None else source.supervisor.status.state
        if state in _SHUT:
            raise NotExpected(f"source {source_id} is {state}, nobody can publish to it now")

    def _session(self, source_id: str, request: Request) -> Session:
        session = self._sessions.get((source_id, request.path_params["session_id"]))
        if session is None:
            raise HTTPException(404, "there is no such session; it may have ended")
        return session


def _not_allowed(allowed: str) -> Handler:
    async def refuse(request: Request) -> Response:
        """Reserved for versions of the protocol to come (RFC 9725, 4.1)."""
        raise HTTPException(405, f"{request.method} is not for this address; there are {allowed}", {"Allow": allowed})

    return refuse


def receiving_addresses(settings: WebRtcSettings, http: HttpSettings) -> tuple[str, ...] | None:
    """Where media is received: as the settings say, else where HTTP listens; ``None`` for all but loopback."""
    if settings.addresses is not None:
        return tuple(str(address) for address in settings.addresses)
    if http.host == "localhost":
        return ("127.0.0.1",)
    try:
        return None if ipaddress.ip_address(http.host).is_unspecified else (http.host,)
    except ValueError:
        return None


def ice_links(server: IceServer) -> list[str]:
    """``Link`` header fields that tell a publisher of a server (RFC 9725, 4.6)."""
    links = []
    for url in server.urls:
        link = f'<{url}>; rel="ice-server"'
        if server.username is not None and server.credential is not None and url.startswith("turn"):
            credential = server.credential.get_secret_value()
            link += f'; username="{_quoted(server.username)}"; credential="{_quoted(credential)}"'
            link += '; credential-type="password"'
        links.append(link)
    return links


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


async def read_body(request: Request, kind: str, limit: int) -> str:
    """The body as text. Raises ``HTTPException``: 415 for another content type, 413 for one too long, 400."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        raise HTTPException(
            415, f"the body must be {kind}", {"Accept-Patch" if kind == FRAGMENT else "Accept-Post": kind}
        )
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, f"the body is longer than {limit} bytes")
    except ClientDisconnect:
        raise HTTPException(400, "the body broke off") from None
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the body is not text in UTF-8") from None
