"""The one settings schema: YAML file, environment (``SIGHTWIRE_…``), command-line flags."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    Field,
    IPvAnyAddress,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from engines.manifest import Precision
from stream.errors import SettingsError
from stream.source_settings import Seconds, Section, SourceSettings


class ApiSettings(Section):
    """What sources may do that come through the API."""

    networks: tuple[IPvAnyNetwork, ...] | None = None
    """The only networks they may reach; when not given, all but this machine, its links, multicast and metadata
    services. A network opens one of those only if it names it closely: 127.0.0.0/8 does, 0.0.0.0/0 does not."""
    persist: bool = True
    """Whether they are kept, in the home folder, and there again when the service is started again."""
    max_sources: Annotated[int, Field(ge=0, le=100_000)] = 1024
    """Sources, those of the configuration among them, beyond which no more are taken."""


IceUrl = Annotated[str, Field(pattern=r"^(stun|stuns|turn|turns):[A-Za-z0-9.:_\[\]-]+(\?transport=(udp|tcp))?$")]


class IceServer(Section):
    """A STUN or TURN server."""

    urls: Annotated[tuple[IceUrl, ...], Field(min_length=1)]
    """``stun:host[:port]``, ``turn:host[:port][?transport=udp|tcp]``, …"""
    username: str | None = None
    credential: SecretStr | None = None


class WebRtcSettings(Section):
    """How publishers over WebRTC are received (WHIP)."""

    ice_servers: tuple[IceServer, ...] = ()
    """Servers that help to find a way through networks; publishers are told of them too. One STUN and one TURN server
    are used here."""
    addresses: tuple[IPvAnyAddress, ...] | None = None
    """Addresses of this machine to receive media on. When not given: the one that HTTP listens on."""
    connect_timeout_s: Seconds = 15.0
    """How long a publisher may take to connect after its offer was answered."""


class PackSettings(Section):
    """One pack to run."""

    name: str = "base"
    """Name of an exported pack, or the path of its folder."""
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt"] = "auto"
    precision: Precision = "fp32"
    """The least exact one that may be used; a pack has int8 and fp16 files after `sightwire compile`."""
    hop_s: Annotated[float, Field(gt=0, le=120)] | None = None
    """Hop of the pack's main (first) branch, instead of the manifest's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What ONNX Runtime runs on; a GPU that cannot be used is an error, never a silent fallback."""
    require_parity: bool = True
    """Refuse an engine without a parity report."""


class EngineSettings(Section):
    """How inference uses the machine."""

    threads: Annotated[int, Field(ge=1, le=256)] = max(1, (os.cpu_count() or 2) // 2)
    """Engine threads, each with its own copy of the graphs, each using one core."""
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    """Most windows in one batch."""


class RedisSettings(Section):
    """Where events go."""

    url: SecretStr | None = None
    """redis:// or rediss:// address; without it an embedded Valkey server is started."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "sightwire"
    maxlen: Annotated[int, Field(ge=1)] = 100_000
    """Newest events kept in each stream (approximately)."""
    dedupe_s: Annotated[int, Field(ge=60)] = 86_400
    """How long an event id is remembered, so that a second append of it does nothing."""


class HttpSettings(Section):
    """Metrics and health over HTTP."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """0 takes a free port."""
    token: SecretStr | None = None
    """Bearer token; required when ``host`` is not a loopback address."""

    @model_validator(mode="after")
    def _token_off_loopback(self) -> Self:
        if self.host not in ("127.0.0.1", "::1", "localhost") and self.token is None:
            raise ValueError(f"http.token is required when http.host is {self.host}, which is not loopback")
        return self


class EventSettings(Section):
    """When predictions become events."""

    smoothing: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Weight of the newest window in the exponential mean of scores; 1 switches smoothing off."""
    on_windows: Annotated[int, Field(ge=1, le=100)] = 2
    """Windows in a row over the on threshold that start an event."""
    off_windows: Annotated[int, Field(ge=1, le=100)] = 3
    """Windows in a row under the off threshold that end it."""
    update_s: Seconds = 5.0
    """Media time between updates of a running event."""
    area_change: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the picture by which a segmentation class must change for an update."""


class WindowSettings(Section):
    """When a window stops waiting."""

    grace_s: Seconds = 0.5
    """How long a window waits for the late modality after the other has passed its end."""


class RetrySettings(Section):
    """How a lost source is tried again."""

    first_s: Seconds = 0.25
    """Wait after the first failure; it doubles with each further one."""
    max_s: Seconds = 1.0
    """Longest wait."""
    give_up: bool = False
    """Fail a source that cannot be reached at the first try, instead of trying on."""


class SpoolSettings(Section):
    """Events kept on disk while Redis is away."""

    path: Path | None = None
    """SQLite file; in the home folder when not given."""
    max_mb: Annotated[int, Field(ge=1)] = 1024
    """Size over which the spool takes no more; sources then wait, and events of live ones are held in memory."""


def home() -> Path:
    """Folder for exported packs, the embedded server's data and the spool (``SIGHTWIRE_HOME``)."""
    if given := os.environ.get("SIGHTWIRE_HOME"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "sightwire"


class Settings(BaseSettings):
    """Everything a service run needs."""

    model_config = SettingsConfigDict(
        env_prefix="SIGHTWIRE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
    )

    sources: tuple[SourceSettings, ...] = ()
    packs: tuple[PackSettings, ...] = (PackSettings(),)
    engine: EngineSettings = EngineSettings()
    redis: RedisSettings = RedisSettings()
    http: HttpSettings = HttpSettings()
    api: ApiSettings = ApiSettings()
    webrtc: WebRtcSettings = WebRtcSettings()
    events: EventSettings = EventSettings()
    windows: WindowSettings = WindowSettings()
    spool: SpoolSettings = SpoolSettings()
    retry: RetrySettings = RetrySettings()
    stay: bool = False
    """Go on when every source has ended: others may be added while the service runs."""
    check_books: bool = False
    """Assert at every step that each item is accounted for; a bug then ends the service."""
    shutdown_grace_s: Seconds = 10.0

    @model_validator(mode="after")
    def _unique_sources(self) -> Self:
        seen: set[str] = set()
        for source in self.sources:
            if source.id in seen:
                raise ValueError(f"source id {source.id!r} is used twice")
            seen.add(source.id)
        files = [source.record for source in self.sources if source.record is not None]
        if twice := [str(path) for path in files if files.count(path) > 1]:
            raise ValueError(f"record: two sources are recorded to {twice[0]}; give each a file of its own")
        return self


def load_settings(config: Path | None, overrides: dict[str, Any]) -> Settings:
    """Settings from an optional YAML file; the environment wins over it, and ``overrides`` (flags) over both.

    Raises ``SettingsError`` that names the key, and the line when it comes from the file.
    """
    tree: dict[str, Any] = {}
    node: yaml.Node | None = None
    if config is not None:
        tree, node = _read_yaml(config)
    try:
        environment = EnvSettingsSource(Settings)()
    except PydanticSettingsError as error:
        field = re.search('field "([a-z_]+)"', str(error))
        name = f"SIGHTWIRE_{field[1].upper()}" if field else str(error)
        raise SettingsError(f"environment: {name} is not JSON, as lists and sections must be") from None
    merged = _merge(_merge(tree, environment), overrides)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise SettingsError(_first_error(error, config, node)) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read: {error.strerror}; give --config the path of a YAML file"
        ) from error
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not a text file in UTF-8") from None
    try:
        tree = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise SettingsError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise SettingsError(f"{path}: a value cannot be read: {error}; put it in quotes") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply") from None
    if tree is None:
        return {}, None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise SettingsError(f"{path}:1: expected keys and values at the top level, the keys as text")
    return tree, node


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def setting_error(error: ValidationError) -> str:
    """The first thing wrong with settings: key and cause, never the value, which may be a secret."""
    first = error.errors(include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    what = _IN_OTHER_WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "string_pattern_mismatch" and first["loc"][-1] == "id":
        what += ": 1 to 63 of A-Z a-z 0-9 _ . -, the first a letter or digit"
    return f"{key}: {what}"


_IN_OTHER_WORDS = {
    "extra_forbidden": "unknown key",
    "tuple_type": "expected a list",
    "model_type": "expected keys and values",
    "dict_type": "expected keys and values",
}


def unknown_environment() -> list[str]:
    """What is wrong with variables that look like settings and are none, one line each; the value is not shown."""
    known = {name.upper() for name in Settings.model_fields} | {"HOME", "SERVICE"}
    told = []
    for name in sorted(os.environ):
        rest = name.removeprefix("SIGHTWIRE_")
        if rest == name or rest.partition("__")[0] in known or rest.startswith("REQUIRE_"):
            continue
        section = next((other for other in sorted(known) if rest.startswith(f"{other}_")), None)
        meant = f"; did you mean SIGHTWIRE_{section}__{rest[len(section) + 1 :]}?" if section else ""
        told.append(f"the environment has {name}, which is no setting{meant}")
    return told


def _first_error(error: ValidationError, config: Path | None, node: yaml.Node | None) -> str:
    line = _line_of(node, error.errors(include_input=False)[0]["loc"])
    place = f"{config}:{line}: " if config is not None and line is not None else ""
    return place + setting_error(error)


def _line_of(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int | None:
    """Line of the deepest part of ``loc`` that the file has, or ``None`` when it has none of it."""
    line: int | None = None
    for part in loc:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line
