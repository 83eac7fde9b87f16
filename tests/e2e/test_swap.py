"""Packs of the real command: listed and swapped from another terminal, and one of them broken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engines.tinypack import write_tiny_pack
from tests.e2e.command import Running, sightwire

SOURCE = "cam=synthetic://scene?fps=25&width=64&height=36&audio=1&brightness=0:1"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A home folder with two exported packs, and one that was damaged."""
    packs = tmp_path / "home" / "packs"
    for name in ("tiny", "day", "broken"):
        write_tiny_pack(packs / name, name=name)
    graph = packs / "broken" / "watch_window.onnx"
    graph.write_bytes(graph.read_bytes()[:700])
    return tmp_path / "home"


@pytest.fixture
def service(house: Path) -> Iterator[Running]:
    """A service of two packs, of which one cannot be run."""
    chosen = ["--pack", "broken", "--pack", "tiny", "--backend", "onnxruntime", "--http-port", "0"]
    running = Running(house, "run", "--source", SOURCE, "--fast", "--quiet", *chosen)
    running.wait_for(lambda text: "Ctrl-C ends it" in text, timeout_s=60)
    yield running
    running.kill()


def test_packs_are_listed_and_swapped_from_another_terminal(house: Path, service: Running) -> None:
    (told,) = [line for line in service.text().splitlines() if "does not run" in line]
    assert "pack broken does not run, the others go on without it: pack broken: watch_window.onnx is not" in told
    address = re.search(r"page +(http://\S+)/ ", service.text())
    assert address is not None
    api = address[1]
    listed = sightwire(house, "packs", "list", "--api", api).out
    assert re.search(r"tiny +serving +tiny 1 \(\w{8}\) +onnxruntime fp32 +action, class, scene", listed)
    assert re.search(r"broken +failed", listed)
    done = sightwire(house, "packs", "swap", "tiny", "--to", "day", "--compare", "1", "--api", api)
    assert done.code == 0, done.err
    assert re.search(r"action +\d+ +0\.00%", done.out)
    assert "pack tiny: day 1 took over (onnxruntime fp32)" in done.out
    failed = sightwire(house, "packs", "swap", "tiny", "--to", "broken", "--compare", "1", "--api", api)
    assert failed.code == 1
    assert failed.errors[0].startswith("error: pack tiny stays as it was: pack broken: watch_window.onnx is not the")
    packs = {one["name"]: one for one in httpx.get(f"{api}/v1/packs").json()}
    assert (packs["tiny"]["state"], packs["tiny"]["pack"]["name"]) == ("serving", "day")
    refused = httpx.post(f"{api}/v1/packs/broken:swap", json={"pack": "tiny"})
    assert refused.status_code == 409 and refused.json()["detail"].startswith("pack broken does not run")
    ended = service.end()
    assert ended.code == 0 and "pack tiny: day 1 took over" in ended.err


def test_nothing_but_a_broken_pack_is_one_error(house: Path) -> None:
    done = sightwire(house, "run", "--source", SOURCE, "--pack", "broken", "--http-port", "0")
    assert done.code == 1 and len(done.errors) == 1
    assert done.errors[0].startswith("error: pack broken: watch_window.onnx is not the file the manifest describes")
    assert "does not run, the others" not in done.err
