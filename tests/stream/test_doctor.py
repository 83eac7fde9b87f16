"""What `sightwire doctor` finds, on this very machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from stream import doctor
from stream.doctor import Check, examine
from stream.settings import load_settings


async def findings() -> dict[str, Check]:
    return {check.name: check for check in await examine(load_settings(None, {}))}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIGHTWIRE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


async def test_a_fresh_machine_is_told_the_next_step(home: Path) -> None:
    found = await findings()
    assert found["home"].ok and str(home) in found["home"].finding
    assert found["packs"].ok is None and "sightwire export base" in found["packs"].finding
    assert found["Redis"].ok and "embedded" in found["Redis"].finding
    assert found["backend onnxruntime"].ok


async def test_it_says_what_the_home_folder_holds(home: Path) -> None:
    (home / "packs" / "mine").mkdir(parents=True)
    (home / "packs" / "mine" / "net.onnx").write_bytes(bytes(3 << 20))
    (home / "spool.db").write_bytes(bytes(1 << 20))
    found = (await findings())["home"].finding
    assert "packs 3.0 MiB" in found and "spool 1.0 MiB" in found


async def test_a_damaged_graph_is_seen_though_its_hash_agrees(home: Path, tiny_pack: Path) -> None:
    folder = home / "packs" / "tiny"
    shutil.copytree(tiny_pack, folder)
    assert (await findings())["pack tiny"].ok
    manifest = json.loads((folder / "manifest.json").read_text())
    graph = manifest["graphs"][0]
    whole = (folder / graph["file"]).read_bytes()
    (folder / graph["file"]).write_bytes(whole[: len(whole) // 2])
    graph["sha256"] = hashlib.sha256(whole[: len(whole) // 2]).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = (await findings())["pack tiny"]
    assert found.ok is False and f"graph {graph['name']}" in found.finding and "export the pack again" in found.finding


async def test_a_disk_that_is_nearly_full_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 62)
    home = (await findings())["home"]
    assert home.ok is False and "free some space" in home.finding


async def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIGHTWIRE_HOME", str(tmp_path / "file" / "home"))
    found = await findings()
    assert found["home"].ok is False and "set SIGHTWIRE_HOME" in found["home"].finding
    assert found["Redis"].ok is False and "set SIGHTWIRE_HOME" in found["Redis"].finding
