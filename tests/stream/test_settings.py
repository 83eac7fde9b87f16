"""Settings: one schema for file, environment and flags; errors name key and line."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from stream.cli import named_sources, settings_from
from stream.errors import SettingsError
from stream.secrets import SecretFilter, register_secrets
from stream.settings import load_settings, unknown_environment
from stream.settings_text import settings_text
from stream.source_settings import SourceSettings, redacted_url


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
        ("1: x\n", ":1: expected keys and values"),
        ("a: \x07\n", "not valid YAML"),
        ("a: 2026-02-30\n", "day is out of range for month; put it in quotes"),
        pytest.param(f"a: {'9' * 5000}\n", "put it in quotes", id="digits"),
        pytest.param("a: " + "[" * 3000 + "]" * 3000, "nested too deeply", id="nested"),
        (
            "sources:\n  - id: a\n    url: rtsp://u:can/ary@h/x\n",
            ":3: sources.0.url: the password must be percent-encoded",
        ),
        ("- a\n", ":1: expected keys and values"),
        ("sources: rtsp://h/x\n", ":1: sources: expected a list"),
        ("packs: [base]\n", ":1: packs.0: expected keys and values"),
        ("sources:\n  - id: front door\n    url: a.mp4\n", ":2: sources.0.id: String should match"),
        (
            "sources:\n  - id: a\n    url: a.mp4\n    schedule:\n      - {start: 18:00, end: 22:30}\n",
            ':5: sources.0.schedule.0.start: a time of day is text; write it in quotes, "18:00"',
        ),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path, {})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path)) or "used twice" in expected


def test_a_variable_that_is_nearly_a_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SIGHTWIRE_")]:
        monkeypatch.delenv(name)
    assert unknown_environment() == []
    monkeypatch.setenv("SIGHTWIRE_REDIS_URL", "redis://:canary@h")
    monkeypatch.setenv("SIGHTWIRE_REDIS__PREFIX", "fine")
    monkeypatch.setenv("SIGHTWIRE_COLOUR", "red")
    assert unknown_environment() == [
        "the environment has SIGHTWIRE_COLOUR, which is no setting",
        "the environment has SIGHTWIRE_REDIS_URL, which is no setting; did you mean SIGHTWIRE_REDIS__URL?",
    ]


def test_the_file_to_begin_with_holds_every_default(tmp_path: Path) -> None:
    text = settings_text()
    assert load_settings(write(tmp_path, text), {}) == load_settings(None, {}), "all of it is commented out"
    lines = [line[1:] for line in text.partition("\n\n")[2].splitlines()]
    shown = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    given = load_settings(write(tmp_path, shown), {})
    assert given.model_copy(update={"sources": ()}) == load_settings(None, {})
    (source,) = given.sources
    assert source == SourceSettings.model_validate({"id": source.id, "url": source.url})
    for name in SourceSettings.model_fields.keys() - {"trusted"}:
        assert f"    {name}: " in shown or f"  - {name}: " in shown


def test_a_list_in_the_environment_must_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTWIRE_SOURCES", "rtsp://u:canary@h/x")
    with pytest.raises(SettingsError, match="SIGHTWIRE_SOURCES is not JSON") as caught:
        load_settings(None, {})
    assert "canary" not in str(caught.value)


def test_a_password_is_in_no_error_and_no_repr(tmp_path: Path) -> None:
    path = write(tmp_path, "sources:\n  - id: a\n    url: ftp://user:canary@host/x\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path, {})
    assert "canary" not in str(caught.value)
    good = load_settings(write(tmp_path, "sources:\n  - id: a\n    url: rtsp://user:canary@host/x\n"), {})
    assert "canary" not in repr(good) and "canary" not in good.model_dump_json()
    assert redacted_url("rtsp://user:canary@host:554/x?token=canary") == "rtsp://host:554/x"


@pytest.mark.parametrize("password", ["canary", "can/ary", "can#ary", "can?ary", "can@ary", "can:ary"])
def test_no_part_of_any_password_is_shown(password: str) -> None:
    url = f"rtsp://user:{password}@host:554/stream?token=x#y"
    assert redacted_url(url) == "rtsp://host:554/stream"
    assert [source["id"] for source in named_sources([url], fast=False, loop=False)] == ["stream"]


def test_a_binary_file_and_a_broken_environment_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sightwire.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="not a text file"):
        load_settings(path, {})
    monkeypatch.setenv("SIGHTWIRE_SOURCES", "xx")
    with pytest.raises(SettingsError, match="environment"):
        load_settings(None, {})


def test_backend_alone_keeps_the_packs_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "packs:\n  - {name: mine, hop_s: 1.0}\n")
    (pack,) = settings_from(path, None, None, None, backend="onnxruntime").packs
    assert (pack.name, pack.hop_s, pack.backend) == ("mine", 1.0, "onnxruntime")


def test_secrets_stay_out_of_the_log_whoever_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    register_secrets(load_settings(None, {"sources": [{"id": "a", "url": "rtsp://u:p%40canary1@h/x"}]}))
    with caplog.filtering(SecretFilter()):
        logging.getLogger("libav").error("Opening %s failed", "rtsp://u:p%40canary1@h/x")
        logging.getLogger("other").error("login p@canary1 refused by http://x:other@h/")
        try:
            raise OSError("rtsp://u:p%40canary1@h/x")
        except OSError:
            logging.getLogger("other").exception("it broke")
    text = caplog.text + "".join(str(record.exc_text) for record in caplog.records)
    assert "canary1" not in "".join(r.getMessage() for r in caplog.records) and "other@" not in text
    assert all("canary1" not in str(record.exc_text) for record in caplog.records)


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
    given = ["rtsp://u:p@10.0.0.1:554/cam", "door=rtsp://h/cam", "rtsp://h2/cam", "/videos/My street.mp4", "Café.mp4"]
    sources = named_sources(given, fast=False, loop=False)
    assert [source["id"] for source in sources] == ["cam", "door", "cam-2", "My-street", "Caf"]
    assert sources[1]["url"] == "rtsp://h/cam"


def test_live_is_what_comes_in_its_own_time() -> None:
    def live(url: str, pace: str) -> bool:
        return load_settings(None, {"sources": [{"id": "a", "url": url, "pace": pace}]}).sources[0].live

    assert live("rtsp://h/x", "fast") and live("a.mp4", "realtime") and not live("a.mp4", "fast")
