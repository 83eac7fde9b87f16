"""Settings: one schema for file, environment and flags; errors name key and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.cli import named_sources
from stream.errors import SettingsError
from stream.settings import load_settings, redacted_url


def write(folder: Path, text: str) -> Path:
    path = folder / "sightwire.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis:\n  prefix: a\n  colour: red\n", ":3: redis.colour: unknown key"),
        ("sources:\n  - id: a\n    url: gopher://h/x\n", ":3: sources.0.url: scheme 'gopher' is not supported"),
        ("sources:\n  - id: a\n    url: a.mp4\n  - id: a\n    url: b.mp4\n", "source id 'a' is used twice"),
        ("engine:\n  threads: none\n", ":2: engine.threads: "),
        ("http:\n  host: 0.0.0.0\n", ":1: http: http.token is required when http.host is 0.0.0.0"),
        ("a: [1,\n", "not valid YAML"),
        ("- a\n", ":1: expected keys and values"),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path, {})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path)) or "used twice" in expected


def test_a_password_is_in_no_error_and_no_repr(tmp_path: Path) -> None:
    path = write(tmp_path, "sources:\n  - id: a\n    url: ftp://user:canary@host/x\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path, {})
    assert "canary" not in str(caught.value)
    good = load_settings(write(tmp_path, "sources:\n  - id: a\n    url: rtsp://user:canary@host/x\n"), {})
    assert "canary" not in repr(good) and "canary" not in good.model_dump_json()
    assert redacted_url("rtsp://user:canary@host:554/x?token=canary") == "rtsp://host:554/x"


def test_flags_win_over_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTWIRE_REDIS__PREFIX", "env")
    monkeypatch.setenv("SIGHTWIRE_REDIS__MAXLEN", "7")
    path = write(tmp_path, "redis:\n  prefix: file\n  dedupe_s: 61\n")
    settings = load_settings(path, {"http": {"port": 0}})
    assert (settings.redis.prefix, settings.redis.maxlen, settings.http.port) == ("env", 7, 0)
    assert settings.redis.dedupe_s == 61
    assert load_settings(path, {"redis": {"prefix": "flag"}}).redis.prefix == "flag"


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read: No such file"):
        load_settings(tmp_path / "none.yaml", {})


def test_sources_from_the_command_line_get_names_of_their_own() -> None:
    given = ["rtsp://u:p@10.0.0.1:554/cam", "door=rtsp://h/cam", "rtsp://h2/cam", "/videos/My street.mp4"]
    sources = named_sources(given, fast=False, loop=False)
    assert [source["id"] for source in sources] == ["cam", "door", "cam-2", "My-street"]
    assert sources[1]["url"] == "rtsp://h/cam"


def test_live_is_what_comes_in_its_own_time() -> None:
    def live(url: str, pace: str) -> bool:
        return load_settings(None, {"sources": [{"id": "a", "url": url, "pace": pace}]}).sources[0].live

    assert live("rtsp://h/x", "fast") and live("a.mp4", "realtime") and not live("a.mp4", "fast")
