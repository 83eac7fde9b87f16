"""Sources of the API that are kept in a file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stream.secrets import without_secrets
from stream.source_settings import SourceSettings
from stream.source_store import SourceStore, plain

CANARY = "hunter2-kept"
URL = f"rtsp://user:{CANARY}@10.0.0.5/x"


def settings(source_id: str = "cam", **more: Any) -> SourceSettings:
    return SourceSettings.model_validate({"id": source_id, "url": URL, "trusted": False, **more})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[SourceStore, list[SourceSettings]]]:
    store = SourceStore(path)
    try:
        yield store, store.open()
    finally:
        store.close()


def flush(store: SourceStore) -> None:
    """Until it is on disk."""
    asyncio.run(store.flushed())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "sources.json"


def test_what_is_put_is_found_again_with_all_that_was_said_of_it(path: Path) -> None:
    full = settings(
        roi=[[[0, 0], [1, 0], [1, 1]]],
        schedule=[{"days": ["mon"], "start": "18:00", "timezone": "Europe/Berlin"}],
        packs=["base"],
        hop_s=0.5,
        audio=False,
    )
    phone = SourceSettings.model_validate({"id": "p", "url": "webrtc:", "publish_token": CANARY, "trusted": False})
    with opened(path) as (store, found):
        assert found == [] and not path.exists()
        for one in (full, phone, settings("gone")):
            store.put(one)
        store.drop("gone")
        flush(store)
        # What is on disk now is what a kill would leave.
        assert [entry["id"] for entry in json.loads(path.read_text())["sources"]] == ["cam", "p"]
    with opened(path) as (store, found):
        assert found == [full, phone]
        assert [one.model_fields_set for one in found] == [full.model_fields_set, phone.model_fields_set]
        assert not any(one.trusted for one in found)


def test_the_file_is_private_and_replaced_whole(path: Path) -> None:
    with opened(path) as (store, _):
        old_mask = os.umask(0)
        try:
            store.put(settings())
            flush(store)
        finally:
            os.umask(old_mask)
        assert path.stat().st_mode & 0o777 == 0o600
        before = path.stat().st_ino
        store.put(settings("b"))
        flush(store)
        assert path.stat().st_ino != before
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["sources.json", "sources.json.lock"]


def test_an_operator_s_source_is_not_kept(path: Path) -> None:
    with opened(path) as (store, _):
        store.put(settings())
        store.put(SourceSettings.model_validate({"id": "cam", "url": URL}))
        flush(store)
        assert "cam" not in store and json.loads(path.read_text())["sources"] == []


def test_a_file_cannot_make_a_source_trusted(path: Path) -> None:
    path.parent.mkdir()
    entries = [{**plain(settings()), "trusted": True}, {"id": "file", "url": "/etc/passwd", "trusted": True}]
    path.write_text(json.dumps({"version": 1, "sources": entries}))
    with opened(path) as (_, found):
        assert found == [settings()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is no JSON"),
        (b'{"version": 1, "sources": [{"id": "cam", "url": "rtsp://u:' + CANARY.encode(), "it is no JSON"),
        (b"\x00" * 4096, "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "settings: "),
        (b'{"version": 2, "sources": []}', "a newer Sightwire wrote it"),
        (b'{"version": 0, "sources": []}', "version: "),
        (b'{"version": 1}', "sources: Field required"),
        (b'{"version": 1, "sources": [{"url": "x"}]}', "sources.0.id: Field required"),
        (b'{"version": 1, "sources": [{"id": "a"}, {"id": "a"}]}', "an id is there twice"),
    ],
)
def test_a_damaged_file_is_told_of_once_and_moved_aside(
    path: Path, caplog: pytest.LogCaptureFixture, content: bytes, said: str
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with opened(path) as (store, found):
        assert found == [] and store.active
        store.put(settings())
        flush(store)
    (told,) = [record.getMessage() for record in caplog.records]
    assert said in told and CANARY not in told and "\n" not in told
    (aside,) = path.parent.glob("sources.json.damaged-*")
    assert aside.read_bytes() == content and str(aside) in told
    with opened(path) as (_, found):
        assert found == [settings()]


def test_an_entry_that_does_not_validate_is_left_out_and_stays(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    odd = {"id": "odd", "url": URL, "of_a_later_version": CANARY}
    path.write_text(json.dumps({"version": 1, "sources": [odd, plain(settings())]}))
    with opened(path) as (store, found):
        assert found == [settings()] and "odd" in store
        store.put(settings("b"))
        flush(store)
    assert json.loads(path.read_text())["sources"][0] == odd
    (told,) = [record.getMessage() for record in caplog.records]
    assert "source odd" in told and "of_a_later_version: unknown key" in told and CANARY not in told


def test_two_services_do_not_share_a_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path) as (first, _), opened(path) as (second, found):
        assert found == [] and first.active and not second.active
        second.put(settings("other"))
        flush(second)
        first.put(settings())
        flush(first)
        assert "belongs to another service" in caplog.text
    with opened(path) as (_, found):
        assert found == [settings()]


def test_a_folder_that_cannot_be_written_costs_the_memory_and_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.write_text("a file where the folder should be")
    with opened(path) as (store, found):
        assert found == [] and not store.active
        store.put(settings())
        flush(store)
    assert len(caplog.records) == 1 and "not kept" in caplog.text


def test_a_disk_that_is_full_for_a_while(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with opened(path) as (store, _):
        store.put(settings("a"))
        flush(store)
        before = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr("stream.source_store.os.fsync", full)
            store.put(settings("b"))
            store.put(settings("c"))
            flush(store)
            assert not store.active and path.read_bytes() == before
        assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
        store.put(settings("d"))
        flush(store)
        assert store.active
        assert [entry["id"] for entry in json.loads(path.read_text())["sources"]] == ["a", "b", "c", "d"]


def test_passwords_that_were_kept_are_blanked_out_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as (store, _):
        store.put(settings())
        flush(store)
    monkeypatch.setattr("stream.secrets._known", set())
    with opened(path):
        assert CANARY not in without_secrets(f"FFmpeg says {CANARY}")
