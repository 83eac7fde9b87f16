"""The ``sightwire`` command. Thin: parses, calls, prints; errors are one line with cause and remedy."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.errors import EngineError
from stream.cli_models import models_app
from stream.cli_packs import packs_app
from stream.cli_sources import sources_app
from stream.errors import SettingsError, SightwireError
from stream.secrets import register_secrets
from stream.settings import Settings, home, load_settings, unknown_environment
from stream.source_settings import redacted_url, source_scheme
from stream.terminal import err, out, set_up_logging

log = logging.getLogger(__name__)
app = typer.Typer(
    name="sightwire",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(models_app)
app.add_typer(sources_app, name="sources")
app.add_typer(packs_app, name="packs")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What may stand before the = of ``--source ID=URL``."""
FAILED = 1
"""Exit code when something failed; 2 is a usage error."""

SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source", "-s", help="Camera, stream or file; ID=URL names it. May be given again.", metavar="[ID=]URL"
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="Settings in YAML.")]
RedisOption = Annotated[
    str | None, typer.Option("--redis", help="redis://host:port/db; without it a Valkey server is started here.")
]
PackOption = Annotated[list[str] | None, typer.Option("--pack", help="Pack to run, by name or folder (default: base).")]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", help="auto, onnxruntime, openvino or tensorrt (default: auto, the fastest here)."),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to find out what is wrong.")]
FastOption = Annotated[bool, typer.Option("--fast", help="Read files as fast as possible, dropping nothing.")]
SecondsOption = Annotated[float | None, typer.Option("--seconds", min=0.1, help="End after this long.")]


def main() -> None:
    """Entry point: every foreseen error ends in one line and exit code 1."""
    try:
        app()
    except* (SightwireError, EngineError) as group:
        for line in dict.fromkeys(str(error) for error in _leaves(group)):
            err.print(f"[bold red]error:[/] {_plain(line)}")
        sys.exit(FAILED)
    except* ModuleNotFoundError as group:
        # What serving needs has been imported by now: the rest belongs to models.
        for missing in _leaves(group):
            err.print(
                f"[bold red]error:[/] {_plain(str(missing))}; pip install 'sightwire\\[train]' brings what models need"
            )
        sys.exit(FAILED)
    except* KeyboardInterrupt:
        sys.exit(130)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def named_sources(given: list[str], *, fast: bool, loop: bool) -> list[dict[str, Any]]:
    """Settings of sources given on the command line, each with an id of its own."""
    sources: list[dict[str, Any]] = []
    used: set[str] = set()
    for text in given:
        name, equals, rest = text.partition("=")
        named = bool(equals) and NAME.fullmatch(name) is not None
        url = rest if named else text
        wanted = name if named else _id_from(url)
        source_id, number = wanted, 2
        while source_id in used:
            source_id, number = f"{wanted}-{number}", number + 1
        used.add(source_id)
        source: dict[str, Any] = {"id": source_id, "url": url, "loop": loop}
        if fast:
            source["pace"] = "fast"
        sources.append(source)
    return sources


def _id_from(url: str) -> str:
    """A name for a source that was given none: the last part of its path, else its host."""
    shown = redacted_url(url)
    parts = [part for part in shown.split("://")[-1].split("/") if part]
    last = parts[-1] if parts else "source"
    stem = last.rsplit(".", 1)[0] if source_scheme(url) == "file" else last
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")
    return safe[:60] or "source"


def settings_from(
    config: Path | None,
    sources: list[str] | None,
    redis: str | None,
    packs: list[str] | None,
    *,
    backend: str | None = None,
    fast: bool = False,
    loop: bool = False,
    source: dict[str, Any] | None = None,
    **more: Any,
) -> Settings:
    """Settings from file and flags; ``source`` is one in full, instead of ``sources``. Raises ``SettingsError``."""
    flags: dict[str, Any] = dict(more)
    if source is not None:
        flags["sources"] = [source]
    if sources:
        flags["sources"] = named_sources(sources, fast=fast, loop=loop)
    if redis:
        flags["redis"] = {"url": redis}
    if packs:
        flags["packs"] = [{"name": name} for name in packs]
    settings = load_settings(config, flags)
    for line in unknown_environment():
        log.warning("%s", line)
    if backend:
        flags["packs"] = [pack.model_dump() | {"backend": backend} for pack in settings.packs]
        settings = load_settings(config, flags)
    register_secrets(settings)
    return settings


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Cameras and streams in, events out."""


@app.command()
def run(
    source: SourceOption = None,
    config: ConfigOption = None,
    redis: RedisOption = None,
    pack: PackOption = None,
    backend: BackendOption = None,
    fast: FastOption = False,
    loop: Annotated[bool, typer.Option("--loop", help="Start files again when they end.")] = False,
    http_port: Annotated[
        int | None,
        typer.Option("--http-port", help="Port of the API and /metrics; 0 takes a free one (default: 9464)."),
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Go on without sources: add them while it runs.")] = False,
    seconds: SecondsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not show events.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Watch sources and publish their events to Redis."""
    set_up_logging(verbose)
    more: dict[str, Any] = {} if http_port is None else {"http": {"port": http_port}}
    if stay:
        more["stay"] = True

    def read() -> Settings:
        return settings_from(config, source, redis, pack, backend=backend, fast=fast, loop=loop, **more)

    settings = read()
    if not settings.sources and not settings.stay:
        raise SettingsError("no source: give --source URL, sources in --config FILE, or --stay to add them later")
    _serve(settings, seconds=seconds, show=not quiet, publish=True, reload=read)


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="Camera, stream or file.", metavar="SOURCE")],
    pack: PackOption = None,
    backend: BackendOption = None,
    fast: FastOption = False,
    seconds: SecondsOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Watch one source and show its events here; nothing is published."""
    set_up_logging(verbose)
    settings = settings_from(None, [source], None, pack, backend=backend, fast=fast, retry={"give_up": True})
    _serve(settings, seconds=seconds, show=True, publish=False)


def _serve(
    settings: Settings,
    *,
    seconds: float | None,
    show: bool,
    publish: bool,
    reload: Callable[[], Settings] | None = None,
) -> None:
    from stream import runner, screen

    shower: Callable[..., None] | None = screen.event_printer(out) if show else None
    loading = err.status("loading packs and warming up engines")

    def started(where: runner.Addresses) -> None:
        loading.stop()
        screen.print_addresses(err, where, settings)

    with loading:
        serving = runner.run(settings, show=shower, started=started, seconds=seconds, publish=publish, reload=reload)
        summary = asyncio.run(serving)
    screen.print_summary(err, summary)
    if summary.failed:
        raise typer.Exit(FAILED)


@app.command()
def record(
    source: Annotated[str, typer.Argument(help="Camera or stream; ID=URL names it.", metavar="[ID=]SOURCE")],
    file: Annotated[Path, typer.Argument(help="Matroska file to write (.mkv).")],
    seconds: SecondsOption = None,
    max_mb: Annotated[int, typer.Option("--max-mb", min=8, help="Size over which the oldest media goes.")] = 4096,
    verbose: VerboseOption = False,
) -> None:
    """Record a camera as it comes, to be replayed with the same windows and events."""
    set_up_logging(verbose)
    from stream import record as recording

    named = named_sources([source], fast=False, loop=False)[0] | {"record": str(file), "record_max_mb": max_mb}
    settings = settings_from(None, None, None, None, source=named, retry={"give_up": True})
    with err.status(f"connecting to {settings.sources[0].id}") as status:
        done = asyncio.run(
            recording.record(
                settings.sources[0],
                settings.retry,
                seconds=seconds,
                live=lambda: status.update(f"recording {settings.sources[0].id}; Ctrl-C ends it"),
            )
        )
    if done.error is not None:
        raise done.error
    recording.print_recorded(err, done)
    if not done.files or not done.complete:
        raise typer.Exit(FAILED)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="What `sightwire record` wrote.", metavar="FILE")],
    config: ConfigOption = None,
    pack: PackOption = None,
    backend: BackendOption = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="In its own time, not as fast as possible.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Publish to Redis what the live run did not.")] = False,
    redis: RedisOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Live through a recording again: the windows and event ids of the live run."""
    set_up_logging(verbose)
    from stream.ingest.replay import replayed_source

    source = replayed_source(file) | {"pace": "realtime" if realtime else "fast"}
    if pack:
        source.pop("packs", None)
    settings = settings_from(config, None, redis, pack, backend=backend, source=source, stay=False)
    _serve(settings, seconds=None, show=True, publish=publish or redis is not None)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with events as they come.")] = False,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="action, class, segmentation or source.")] = None,
    source: Annotated[list[str] | None, typer.Option("--source", "-s", help="Only of this source.")] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=0, help="Show this many that are there already.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    redis: RedisOption = None,
    prefix: Annotated[str | None, typer.Option("--prefix", help="Prefix of the streams.")] = None,
) -> None:
    """Show events from Redis."""
    set_up_logging()
    from stream import screen, tail

    settings = settings_from(None, None, redis, None)
    shown = asyncio.run(
        tail.show_events(
            settings,
            screen.received_printer(out, as_json=as_json),
            following=follow,
            kinds=kind,
            sources=source,
            last=last,
            prefix=prefix or settings.redis.prefix,
        )
    )
    if shown == 0 and last > 0:
        err.print("no such events yet; --follow waits for them")


@app.command()
def doctor(redis: RedisOption = None) -> None:
    """Say what is installed, which backends work, which Redis there is, and why not."""
    from stream.doctor import examine
    from stream.screen import print_checks

    checks = asyncio.run(examine(settings_from(None, None, redis, None)))
    print_checks(out, checks)
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


@app.command()
def demo(
    seconds: Annotated[
        float | None, typer.Option("--seconds", envvar="DEMO_SECONDS", min=1, help="End after this long.")
    ] = None,
    http_port: Annotated[
        int, typer.Option("--http-port", help="Port of the API and /metrics; 0 takes a free one.")
    ] = 9464,
) -> None:
    """Run on two sample sources: a street over RTSP and a clip with sound."""
    set_up_logging()
    from stream.demo import run_demo

    run_demo(out, err, seconds, http_port)


@app.command("settings")
def show_settings() -> None:
    """Print every setting with its meaning and default, as a file to begin with."""
    from stream.settings_text import settings_text

    out.out(settings_text(), end="", highlight=False)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    out.print(f"sightwire {installed('sightwire')} (home {home()}, pid {os.getpid()})")


if __name__ == "__main__":
    main()
