"""Sources over HTTP: ``/v1/sources``."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Body, Header, HTTPException, Response
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
IfMatch = Annotated[str | None, Header()]


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
    kept: bool
    """Whether it is there again when the service is started again."""
    settings: dict[str, Any]
    """What it was started with, secrets left out."""


def report(source: RunningSource, clock: Clock, *, kept: bool) -> SourceReport:
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
        kept=kept,
        settings=source.settings.model_dump(mode="json", exclude={"url", "id", "trusted"}),
    )


class Tags:
    """Entity tags: another one whenever a source was changed or started anew.

    They are numbers of this process, not hashes of settings, from which a password could be guessed.
    """

    def __init__(self) -> None:
        self._process = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._seen: WeakKeyDictionary[RunningSource, int] = WeakKeyDictionary()

    def of(self, source: RunningSource) -> str:
        """The tag of a source as it runs now."""
        if source not in self._seen:
            self._seen[source] = next(self._numbers)
        return f'"{self._process}-{self._seen[source]}"'

    def check(self, source: RunningSource, wanted: str | None) -> None:
        """Refuse, with 412, a change of something else than the client has seen."""
        if wanted is None or wanted.strip() == "*":
            return
        if self.of(source) not in (tag.strip() for tag in wanted.split(",")):
            raise HTTPException(412, f"source {source.settings.id} was changed meanwhile; look at it again")


def sources_router(sources: Sources, clock: Clock, max_sources: int = MAX_SOURCES) -> APIRouter:
    """The resource. Every handler runs on the event loop, where sources are changed."""
    router = APIRouter(prefix="/v1/sources")
    tags = Tags()

    def shown(source: RunningSource, response: Response) -> SourceReport:
        response.headers["ETag"] = tags.of(source)
        return report(source, clock, kept=sources.is_kept(source.settings))

    @router.get("")
    async def list_sources() -> list[SourceReport]:
        """All sources."""
        return [report(source, clock, kept=sources.is_kept(source.settings)) for source in list(sources.values())]

    @router.get("/{source_id}")
    async def show(source_id: str, response: Response) -> SourceReport:
        """One source."""
        with _refusals():
            return shown(sources.known(source_id), response)

    @router.post("", status_code=201)
    async def add(fields: Fields, response: Response) -> SourceReport:
        """Start a source."""
        with _refusals():
            settings = _settings(fields)
            if settings.id not in sources and len(sources) >= max_sources:
                raise HTTPException(409, f"{max_sources} sources are watched already; remove one")
            source = sources.add(settings)
            await sources.kept()
        response.headers["Location"] = f"/v1/sources/{settings.id}"
        return shown(source, response)

    @router.patch("/{source_id}")
    async def change(source_id: str, fields: Fields, response: Response, if_match: IfMatch = None) -> SourceReport:
        """Change settings of a source, which starts it anew if they differ. ``null`` takes one back to its default."""
        with _refusals():
            source = sources.known(source_id)
            tags.check(source, if_match)
            settings = _changed(source.settings, fields)
            if settings != source.settings:
                source = await sources.replace(settings)
                await sources.kept()
            return shown(source, response)

    @router.post("/{source_id}:restart")
    async def restart(source_id: str, response: Response) -> SourceReport:
        """Connect anew, at once."""
        with _refusals():
            return shown(await sources.restart(source_id), response)

    @router.delete("/{source_id}", status_code=204)
    async def remove(source_id: str, if_match: IfMatch = None) -> None:
        """End a source; answers after its last event."""
        with _refusals():
            if if_match is not None:
                tags.check(sources.known(source_id), if_match)
            await sources.remove(source_id)
            await sources.kept()

    return router


def _changed(before: SourceSettings, fields: dict[str, Any]) -> SourceSettings:
    """Settings with some of them given anew. Raises ``SettingsError``."""
    if fields.get("id", before.id) != before.id:
        raise SettingsError("id: a source keeps its name; add another and remove this one")
    # A source of the operator's may keep its address and files; those that the API gives are not trusted.
    trusted = before.trusted and "url" not in fields and fields.get("record") is None
    kept = {name: getattr(before, name) for name in before.model_fields_set - {"trusted"}}
    unknown = {name: value for name, value in fields.items() if name not in SourceSettings.model_fields}
    wanted = {name: value for name, value in {**kept, **fields}.items() if value is not None}
    return _settings({**wanted, **unknown}, trusted=trusted)


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
