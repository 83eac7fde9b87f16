"""Sources over HTTP: ``/v1/sources``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from stream.clock import NS_PER_S, Clock
from stream.errors import SettingsError
from stream.secrets import remember_source, without_secrets
from stream.settings import setting_error
from stream.source_settings import SourceSettings, redacted_url
from stream.sources import RunningSource, SourceBusy, SourceExists, Sources, UnknownSource

MAX_SOURCES = 1024
"""More than one process can watch; a client that goes wild is stopped before memory ends."""
Fields = Annotated[dict[str, Any], Body()]


class SourceReport(BaseModel):
    """A source as clients see it. Its URL is shown without user info and query."""

    model_config = ConfigDict(frozen=True)

    id: str
    url: str
    state: str
    since_s: float
    """Seconds in this state."""
    cause: str
    """Why it was lost or could not be reached, the last time; empty when it never was."""
    attempts: int
    """Connection attempts since it was last live."""
    next_retry_s: float | None
    """Seconds until the next one; ``None`` unless it backs off."""
    reconnects: dict[str, int]
    """Times it was live and got lost, by reason."""
    failed_attempts: dict[str, int]
    """Attempts that did not get as far as media, by reason."""
    frames: dict[str, int]
    """Frames by stage."""
    av_skew_s: float | None
    """How far video arrives ahead of audio, in media time."""
    settings: dict[str, Any]
    """What it was started with, secrets left out."""


def report(source: RunningSource, clock: Clock) -> SourceReport:
    """What is known of a source now."""
    now_ns, status = clock.monotonic_ns(), source.supervisor.status
    retry_ns = status.retry_ns
    return SourceReport(
        id=source.settings.id,
        url=redacted_url(source.settings.url.get_secret_value()),
        state=str(source.state(now_ns)),
        since_s=round((now_ns - status.since_ns) / NS_PER_S, 3),
        cause=without_secrets(status.cause),
        attempts=status.attempts,
        next_retry_s=None if retry_ns is None else round(max(0, retry_ns - now_ns) / NS_PER_S, 3),
        reconnects=dict(status.reconnects),
        failed_attempts=dict(status.failed_attempts),
        frames=source.supervisor.frames(),
        av_skew_s=source.pipeline.av_skew_s,
        settings=source.settings.model_dump(mode="json", exclude={"url", "id", "trusted"}),
    )


def sources_router(sources: Sources, clock: Clock) -> APIRouter:
    """The resource. Every handler runs on the event loop, where sources are changed."""
    router = APIRouter(prefix="/v1/sources")

    @router.get("")
    async def list_sources() -> list[SourceReport]:
        """All sources."""
        return [report(source, clock) for source in list(sources.values())]

    @router.get("/{source_id}")
    async def show(source_id: str) -> SourceReport:
        """One source."""
        with _refusals():
            return report(sources.known(source_id), clock)

    @router.post("", status_code=201)
    async def add(fields: Fields, response: Response) -> SourceReport:
        """Start a source."""
        with _refusals():
            if len(sources) >= MAX_SOURCES:
                raise HTTPException(409, f"{MAX_SOURCES} sources are watched already; remove one")
            settings = _settings(fields)
            source = sources.add(settings)
        response.headers["Location"] = f"/v1/sources/{settings.id}"
        return report(source, clock)

    @router.patch("/{source_id}")
    async def change(source_id: str, fields: Fields) -> SourceReport:
        """Change settings of a source, which starts it anew if they differ."""
        with _refusals():
            before = sources.known(source_id).settings
            if fields.get("id", source_id) != source_id:
                raise HTTPException(422, "id: a source keeps its name; add another and remove this one")
            # A source of the operator's may keep its address and files; those that the API gives are not trusted.
            trusted = before.trusted and not {"url", "record"} & fields.keys()
            kept = {name: getattr(before, name) for name in before.model_fields_set - {"trusted"}}
            settings = _settings({**kept, **fields}, trusted=trusted)
            if settings == before:
                return report(sources.known(source_id), clock)
            return report(await sources.replace(settings), clock)

    @router.post("/{source_id}:restart")
    async def restart(source_id: str) -> SourceReport:
        """Connect anew, at once."""
        with _refusals():
            return report(await sources.restart(source_id), clock)

    @router.delete("/{source_id}", status_code=204)
    async def remove(source_id: str) -> None:
        """End a source; answers after its last event."""
        with _refusals():
            await sources.remove(source_id)

    return router


def _settings(fields: dict[str, Any], *, trusted: bool = False) -> SourceSettings:
    if "trusted" in fields:
        raise SettingsError("trusted: only the configuration file may say so")
    try:
        settings = SourceSettings.model_validate({**fields, "trusted": trusted})
    except ValidationError as error:
        raise SettingsError(setting_error(error)) from None
    remember_source(settings)
    return settings


@contextmanager
def _refusals() -> Iterator[None]:
    """The service's errors as answers."""
    try:
        yield
    except UnknownSource as error:
        raise HTTPException(404, str(error)) from None
    except (SourceExists, SourceBusy) as error:
        raise HTTPException(409, str(error)) from None
    except SettingsError as error:
        raise HTTPException(422, without_secrets(str(error))) from None
