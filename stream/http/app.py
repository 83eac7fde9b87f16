"""HTTP: metrics and health. Loopback by default; any other bind needs a bearer token."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from stream.http.guard import check_change
from stream.http.limits import BodyLimit
from stream.settings import HttpSettings


def create_app(
    settings: HttpSettings,
    registry: CollectorRegistry,
    is_ready: Callable[[], bool],
    routers: Sequence[APIRouter] = (),
    unguarded: Sequence[APIRouter] = (),
) -> FastAPI:
    """The application. ``/healthz`` is open to anybody; everything else needs the token when there is one.

    ``routers`` bring the resources of the API, one from each module beside this one; those that are ``unguarded`` have
    rules of their own.
    """
    app = FastAPI(title="Sightwire", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit)
    token = settings.token.get_secret_value() if settings.token is not None else None

    def authorised(request: Request) -> None:
        if token is None:
            return
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def guarded(request: Request) -> None:
        authorised(request)
        check_change(request, has_token=token is not None)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        """One line, as every other refusal."""
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"detail": f"the body is not JSON: {first['ctx']['error']}"}, 422)
        if tuple(first["loc"]) == ("body",):
            return JSONResponse({"detail": 'the body must be a JSON object, {"key": value}'}, 422)
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(404)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        """Routes say themselves what is not there; for the rest, where to look."""
        said = (
            error.detail
            if error.detail != "Not Found"
            else f"there is no {request.url.path}; docs/api.md lists what is"
        )
        return JSONResponse({"detail": said}, 404, error.headers)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", dependencies=[Depends(authorised)])
    def readyz(response: Response) -> dict[str, str]:
        """The engines are warm and the sources started."""
        if is_ready():
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "starting"}

    @app.get("/metrics", dependencies=[Depends(authorised)])
    def metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    for router in routers:
        app.include_router(router, dependencies=[Depends(guarded)])
    for router in unguarded:
        app.include_router(router)
    return app
