"""The artifact cache never gives back anything but what was put in under exactly that key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.backends import EngineOptions, load
from engines.cache import ArtifactCache, CacheKey, user_cache
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
