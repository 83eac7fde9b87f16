"""The artifact cache never gives back anything but what was put in under exactly that key."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.backends import EngineOptions, load
from engines.cache import ArtifactCache, CacheKey, list_cache, prune_cache, user_cache
from engines.manifest import read_manifest
from engines.measure import random_batch
from engines.tinypack import REFERENCES

KEY = CacheKey("a" * 64, "openvino", "1.0", "cpu", "fp32", "dynamic")


def test_put_and_get(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path / "new")
    assert cache.get(KEY) is None
    cache.put(KEY, b"engine\n\nwith blank lines")
    assert cache.get(KEY) == b"engine\n\nwith blank lines"
    cache.put(KEY, b"")
    assert cache.get(KEY) == b""
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".bin"]


@pytest.mark.parametrize("field", ["onnx_sha256", "backend", "version", "device", "precision", "shapes"])
def test_any_other_key_misses(tmp_path: Path, field: str) -> None:
    cache = ArtifactCache(tmp_path)
    cache.put(KEY, b"engine")
    assert cache.get(replace(KEY, **{field: "other"})) is None


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"X", lambda _: b"", lambda raw: raw + b"X"]
)
def test_a_damaged_entry_misses(tmp_path: Path, damage: object) -> None:
    cache = ArtifactCache(tmp_path)
    cache.put(KEY, b"engine")
    path = cache.path(KEY)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.get(KEY) is None


def test_a_foreign_entry_under_the_right_name_misses(tmp_path: Path) -> None:
    cache, other = ArtifactCache(tmp_path), replace(KEY, version="2.0")
    cache.put(other, b"engine of another version")
    cache.path(other).rename(cache.path(KEY))
    assert cache.get(KEY) is None


def test_openvino_compiles_once_and_rebuilds_a_damaged_entry(tiny_master: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    graph = read_manifest(tiny_master).graph("watch_encoder")
    options = EngineOptions(cache_dir=tmp_path)
    inputs = random_batch(graph, 3)
    want = REFERENCES["watch_encoder"](inputs)["features"]

    def run() -> int:
        engine = load(tiny_master / graph.file, "tiny", graph, "openvino", options)
        np.testing.assert_allclose(engine.infer(inputs)["features"], want, atol=1e-5)
        engine.close()
        (entry,) = tmp_path.iterdir()
        return entry.stat().st_ino

    made = run()
    assert run() == made
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(b"not an engine")
    assert run() != made
    assert entry.read_bytes() != b"not an engine"


def test_openvino_compiles_when_it_refuses_a_cached_engine(
    tiny_master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    graph = read_manifest(tiny_master).graph("watch_encoder")
    monkeypatch.setattr(ArtifactCache, "get", lambda self, key: b"not an engine")
    engine = load(tiny_master / graph.file, "tiny", graph, "openvino", EngineOptions(cache_dir=tmp_path))
    engine.infer(random_batch(graph, 1))
    assert "cached engine of graph watch_encoder is refused" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "sightwire"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert user_cache() is None


def filled(folder: Path, count: int, size: int = 1000) -> list[CacheKey]:
    """Entries used one after the other, the first longest ago."""
    cache, keys = ArtifactCache(folder), [replace(KEY, version=str(n)) for n in range(count)]
    for n, key in enumerate(keys):
        cache.put(key, bytes(size))
        os.utime(cache.path(key), (1000.0 + n, 1000.0 + n))
    return keys


def test_entries_are_listed_with_what_they_were_made_for(tmp_path: Path) -> None:
    assert list_cache(tmp_path / "nowhere") == []
    keys = filled(tmp_path, 3)
    (tmp_path / "openvino-broken.bin").write_bytes(b"not an engine")
    (tmp_path / "notes.txt").write_text("of no interest")
    entries = list_cache(tmp_path)
    assert [entry.key for entry in entries] == [None, *reversed(keys)]
    assert all(entry.size == entry.path.stat().st_size for entry in entries)
    assert entries[-1].used_at == 1000.0


def test_pruning_keeps_what_was_used_last(tmp_path: Path) -> None:
    first, second, third = filled(tmp_path, 3)
    cache = ArtifactCache(tmp_path)
    assert cache.get(first) is not None  # Loading is use.
    removed = prune_cache(tmp_path, max_bytes=3000)
    assert [entry.key for entry in removed] == [second]
    assert cache.get(first) is not None
    assert cache.get(third) is not None


def test_pruning_by_age_and_of_broken_files(tmp_path: Path) -> None:
    first, second = filled(tmp_path, 2)
    broken = tmp_path / "openvino-broken.bin"
    broken.write_bytes(bytes(500))
    os.utime(ArtifactCache(tmp_path).path(second))
    assert [entry.key for entry in prune_cache(tmp_path, older_than_s=60)] == [first]
    assert broken.exists()
    left = ArtifactCache(tmp_path).path(second).stat().st_size
    assert [entry.key for entry in prune_cache(tmp_path, max_bytes=left)] == [None]
    assert not broken.exists()
    assert [entry.key for entry in prune_cache(tmp_path, max_bytes=0)] == [second]
    assert list(tmp_path.iterdir()) == []


def test_the_cache_keeps_to_its_limit_but_never_drops_what_it_just_made(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path, max_bytes=2500)
    keys = filled(tmp_path, 2)
    cache.put(KEY, bytes(1000))
    assert [entry.key for entry in list_cache(tmp_path)] == [KEY]
    cache.put(keys[0], bytes(9000))
    assert cache.get(keys[0]) is not None
    assert cache.get(KEY) is None
