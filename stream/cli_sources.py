"""``sightwire sources``: look at and change the sources of a running service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml
from pydantic import SecretStr
from rich.markup import escape
from rich.table import Column, Table

from stream.api import Api, ApiError, quoted
from stream.settings import load_settings
from stream.source_settings import SourceSettings
from stream.terminal import out, set_up_logging

sources_app = typer.Typer(help="The sources of a running service.", no_args_is_help=True)

ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api", envvar="SIGHTWIRE_SERVICE", help="Address of the service (default: by the settings).", metavar="URL"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
SourceId = Annotated[str, typer.Argument(help="Its id.", metavar="ID")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, e.g. --set hop_s=1 --set audio=false; may be given again.", metavar="KEY=VALUE"
    ),
]
WaitOption = Annotated[
    float, typer.Option("--wait", min=0, max=600, help="Seconds to wait for its first connection.", metavar="S")
]
LOOK_S = 0.1
"""How often the service is asked meanwhile."""
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
    whole = (Column(name, overflow="fold") for name in ("source", "address"))
    table = Table(next(whole), "state", "for", "reconnects", "next try", next(whole), box=None)
    for one in found:
        table.add_row(*_row(one))
    out.print(table)
    for one in found:
        if one["cause"] and one["state"] not in ("live", "ended", "paused"):
            out.print(f" {escape(one['id'])}: {_cause(one)}")


def _row(one: dict[str, Any]) -> list[str]:
    retry = one["next_retry_s"]
    return [
        f"[bold]{escape(one['id'])}[/]",
        _state(one),
        _duration(one["since_s"]),
        str(sum(one["reconnects"].values())),
        "" if retry is None else f"in {retry:.1f} s",
        escape(one["url"]),
    ]


def _state(one: dict[str, Any]) -> str:
    """The state in its colour."""
    return f"[{_COLOURS.get(one['state'], 'yellow')}]{escape(one['state'].replace('_', ' '))}[/]"


def _cause(one: dict[str, Any]) -> str:
    """What was wrong, without the name where that has been said."""
    return escape(one["cause"].removeprefix(f"source {one['id']}: "))


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@sources_app.command()
def show(source: SourceId, api: ApiOption = None, as_json: JsonOption = False) -> None:
    """All that is known of one source."""
    one = api_of(api).call("GET", f"/v1/sources/{quoted(source)}")
    if as_json:
        print(json.dumps(one, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _details(one):
        table.add_row(f"[bold]{name}[/]", value)
    out.print(table)


def _details(one: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, as markup; nothing where there is nothing to say."""
    yield "source", escape(one["id"])
    yield "address", escape(one["url"])
    yield "state", f"{_state(one)} for {_duration(one['since_s'])}"
    if one["next_retry_s"] is not None:
        yield "next try", f"in {one['next_retry_s']:.1f} s"
    if one["cause"]:
        yield "last failure" if one["state"] == "live" else "cause", _cause(one)
    for name in ("reconnects", "failed_attempts", "frames"):
        counts = {what: count for what, count in one[name].items() if count}
        if counts:
            told = ", ".join(f"{count} {what}" for what, count in counts.items())
            yield name.replace("_", " "), escape(told.replace("_", " "))
    if one["av_skew_s"] is not None:
        yield "picture before sound", f"{one['av_skew_s'] * 1000:.0f} ms"
    defaults = SourceSettings.model_construct(None, id="", url=SecretStr("")).model_dump(mode="json")
    given = {name: value for name, value in one["settings"].items() if value != defaults.get(name)}
    if given:
        yield "settings", escape(", ".join(f"{name}={json.dumps(value)}" for name, value in given.items()))
    yield "after a restart", "there again" if one.get("kept") else "forgotten"


@sources_app.command()
def add(
    source: SourceId,
    url: Annotated[str, typer.Argument(help="Its address.", metavar="URL")],
    settings: SetOption = None,
    api: ApiOption = None,
    wait: WaitOption = 5.0,
) -> None:
    """Start a source, and say how its first connection went. It is there again after a restart of the service."""
    service = api_of(api)
    said = service.call("POST", "/v1/sources", {"id": source, "url": url, **settings_in(settings)})
    _tell(_settled(service, said, wait))
    if not said["kept"]:
        out.print("  it is forgotten when the service ends: only one that runs on (--stay) keeps sources")


@sources_app.command("set")
def change(source: SourceId, settings: SetOption = None, api: ApiOption = None, wait: WaitOption = 5.0) -> None:
    """Change settings of a source; it starts anew if they differ. KEY=null takes one back to its default."""
    service = api_of(api)
    if not settings:
        raise ApiError("nothing to change; give --set KEY=VALUE")
    said = service.call("PATCH", f"/v1/sources/{quoted(source)}", settings_in(settings))
    _tell(_settled(service, said, wait))


@sources_app.command()
def restart(source: SourceId, api: ApiOption = None, wait: WaitOption = 5.0) -> None:
    """Connect anew, at once."""
    service = api_of(api)
    _tell(_settled(service, service.call("POST", f"/v1/sources/{quoted(source)}:restart"), wait))


@sources_app.command()
def rm(source: SourceId, api: ApiOption = None) -> None:
    """End a source; returns after its last event."""
    api_of(api).call("DELETE", f"/v1/sources/{quoted(source)}")
    out.print(f"source {source}: removed")


def _settled(service: Api, said: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """The source once it has connected or failed to, or as it is after a while."""
    deadline_s = time.monotonic() + wait_s
    while said["state"] == "connecting" and not said["cause"] and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
        said = service.call("GET", f"/v1/sources/{quoted(said['id'])}")
    return said


def _tell(said: dict[str, Any]) -> None:
    failing = bool(said["cause"]) and said["state"] != "live"
    out.print(f"source {escape(said['id'])}: {_state(said)}{'; it is tried again' if said['next_retry_s'] else ''}")
    if failing:
        out.print(f"  {_cause(said)}")


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
