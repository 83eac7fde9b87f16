"""``sightwire sources``: look at and change the sources of a running service."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from stream.api import Api, ApiError, quoted
from stream.settings import load_settings
from stream.terminal import out, set_up_logging

sources_app = typer.Typer(help="The sources of a running service.", no_args_is_help=True)

ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api", envvar="SIGHTWIRE_SERVICE", help="Address of the service [default: by the settings].", metavar="URL"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
SourceId = Annotated[str, typer.Argument(help="Its id.", metavar="ID")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, e.g. --set hop_s=1 --set 'packs=[base]'; may be given again.", metavar="KEY=VALUE"
    ),
]
_COLOURS = {"live": "green", "ended": "dim", "paused": "dim", "failed": "bold red"}


def api_of(address: str | None) -> Api:
    """The service at an address, else at that of the settings."""
    set_up_logging()
    http = load_settings(None, {}).http
    token = None if http.token is None else http.token.get_secret_value()
    host = f"[{http.host}]" if ":" in http.host else http.host
    return Api(address or f"http://{host}:{http.port}", token)


@sources_app.command("list")
def list_sources(api: ApiOption = None, as_json: JsonOption = False) -> None:
    """All sources, their state and what was wrong last."""
    found = api_of(api).call("GET", "/v1/sources")
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        out.print("no sources; add one with `sightwire sources add ID URL`")
        return
    table = Table("source", "state", "for", "reconnects", "next try", "address", box=None)
    for one in found:
        table.add_row(*_row(one))
    out.print(table)
    for one in found:
        if one["cause"] and one["state"] not in ("live", "ended", "paused"):
            out.print(f" {escape(one['cause'])}")


def _row(one: dict[str, Any]) -> list[str]:
    colour = _COLOURS.get(one["state"], "yellow")
    retry = one["next_retry_s"]
    return [
        f"[bold]{escape(one['id'])}[/]",
        f"[{colour}]{one['state']}[/]",
        _duration(one["since_s"]),
        str(sum(one["reconnects"].values())),
        "" if retry is None else f"in {retry:.1f} s",
        escape(one["url"]),
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@sources_app.command()
def show(source: SourceId, api: ApiOption = None) -> None:
    """All that is known of one source, as JSON."""
    print(json.dumps(api_of(api).call("GET", f"/v1/sources/{quoted(source)}"), indent=2))


@sources_app.command()
def add(
    source: SourceId,
    url: Annotated[str, typer.Argument(help="Its address.", metavar="URL")],
    settings: SetOption = None,
    api: ApiOption = None,
) -> None:
    """Start a source."""
    said = api_of(api).call("POST", "/v1/sources", {"id": source, "url": url, **settings_in(settings)})
    out.print(f"source {said['id']}: {said['state']}")


@sources_app.command("set")
def change(source: SourceId, settings: SetOption = None, api: ApiOption = None) -> None:
    """Change settings of a source; it starts anew if they differ."""
    said = api_of(api).call("PATCH", f"/v1/sources/{quoted(source)}", settings_in(settings))
    out.print(f"source {said['id']}: {said['state']}")


@sources_app.command()
def restart(source: SourceId, api: ApiOption = None) -> None:
    """Connect anew, at once."""
    said = api_of(api).call("POST", f"/v1/sources/{quoted(source)}:restart")
    out.print(f"source {said['id']}: {said['state']}")


@sources_app.command()
def rm(source: SourceId, api: ApiOption = None) -> None:
    """End a source; returns after its last event."""
    api_of(api).call("DELETE", f"/v1/sources/{quoted(source)}")
    out.print(f"source {source}: removed")


def settings_in(given: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` with values as in YAML. Raises ``ApiError``."""
    found: dict[str, Any] = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            raise ApiError(f"--set {text}: give KEY=VALUE, the value as in the settings file")
    return found
