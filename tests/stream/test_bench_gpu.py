"""The benchmark for GPUs runs, on a CPU: every figure is there, and wrong answers are caught."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from bench import gpu, gpu_backends, gpu_load  # noqa: E402
from bench.common import BenchError  # noqa: E402
from bench.gpu_windows import Cameras  # noqa: E402
from engines.cache import user_cache  # noqa: E402
from engines.manifest import read_manifest  # noqa: E402
from engines.open import LoadedPack  # noqa: E402
from engines.types import Engine  # noqa: E402
from export.adapters.common import ExportOptions  # noqa: E402
from export.adapters.module import build  # noqa: E402
from export.model import export_model  # noqa: E402
from export.source import note_of, remember, source_of  # noqa: E402

SOURCE = """
import torch
from torch import nn

class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.see = nn.Conv3d(3, 4, 3, padding=1)
        self.say = nn.Linear(4, 3)
    def forward(self, pixels):
        return {"scores": self.say(torch.relu(self.see(pixels)).mean(dim=(2, 3, 4)))}

def build():
    return SmallNet()
"""
DESCRIPTION = """
version: "1"
video: {width: 32, height: 32, frames: 4, fps: 8, layout: BCTHW, mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.25]}
hop_s: 0.25
heads:
  gesture: {kind: action, labels: [wave, point, other], background: [other], activation: sigmoid, output: scores,
            gives: logits}
"""


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pack that was exported here, so that its PyTorch program is at hand."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "small_gpu_net.py").write_text(SOURCE)
        (folder / "net.yaml").write_text(DESCRIPTION)
        torch.manual_seed(0)
        save_file(build("small_gpu_net:build").state_dict(), folder / "net.safetensors")
        options = ExportOptions(weights=folder / "net.safetensors", describe=folder / "net.yaml", name="small")
        note = note_of("small_gpu_net:build", options)
        out = folder / "pack"
        manifest = export_model("small_gpu_net:build", out, options=options, clips=None, source=source_of(note))
        remember(note, manifest, user_cache())
        yield out


def bench(pack: Path, *more: str) -> int:
    given = ["--device", "cpu", "--pack", str(pack), "--seconds", "0.1", "--sources", "1,3", "--max-batch", "2"]
    return gpu.main([*given, *more])


def test_every_backend_of_a_cpu_is_checked_and_measured(
    small_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "gpu.json"
    assert bench(small_pack, "--threads", "2", "--json", str(written)) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "figures of a CPU" in said
    assert "not measured" not in said
    found = json.loads(written.read_text())
    assert (found["device"], found["threads"]) == ("cpu", 2)
    for backend in ("onnxruntime", "torch"):
        for count in (1, 3):
            assert found[f"{backend}_cpu_fp32_windows_per_s_{count}"] > 0
            p50, p95 = (found[f"{backend}_cpu_fp32_latency_p{share}_ms_{count}"] for share in (50, 95))
            assert 0 < p50 <= p95
        # 4 samples, and 2 more for each of three windows after.
        assert found[f"{backend}_cpu_fp32_bytes_per_source"] == 10 * 32 * 32 * 3
    assert all(found[key] > 0 for key in ("swscale_pictures_per_s", "cpu_uploaded_per_s", "cpu_converted_per_s"))
    assert not any("utilisation" in key for key in found), "there is no GPU whose utilisation it could be"


def test_a_staged_pack_and_what_has_no_pytorch_program(tiny_pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tiny_pack) == 0
    said = capsys.readouterr().out
    assert "onnxruntime_cpu_fp32_windows_per_s_3" in said
    assert "torch: not measured: pack tiny holds no PyTorch program" in said


class _Wrong:
    """An engine whose answers are off."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, inputs: Any) -> Any:
        return {name: array + 0.01 for name, array in self._engine.infer(inputs).items()}


def test_a_backend_that_answers_otherwise_than_the_cpu_is_not_measured(
    small_pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu_backends.load

    def load(folder: Path, manifest: Any, backend: gpu_backends.Backend, threads: int = 1) -> LoadedPack:
        pack = right(folder, manifest, backend, threads)
        if backend.name == "torch":
            return pack
        engines = {name: _Wrong(engine) for name, engine in pack.engines.items()}
        return replace(pack, engines=MappingProxyType(engines))

    monkeypatch.setattr(gpu, "load", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_pack.parent / "cache"))
    monkeypatch.syspath_prepend(str(small_pack.parent))
    assert bench(small_pack) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "onnxruntime: off, so not measured: graph" in said
    assert "is off by 0.01" in said
    assert "onnxruntime_cpu_fp32_windows" not in said
    assert "torch_cpu_fp32_windows_per_s_1" in said, "the others go on"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no CUDA device")
    assert "--device cpu" in said
    assert said.count("\n") == 1


def test_an_unknown_pack_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--pack", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no pack")
    assert said.count("\n") == 1


def test_without_weights_there_is_no_base_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "WEIGHTS", tmp_path / "none")
    with pytest.raises(BenchError, match="give --pack"), gpu.pack_folder("base"):
        pass


@pytest.mark.parametrize(
    "given", [["--sources", "0"], ["--sources", "1,x"], ["--seconds", "0"], ["--threads", "65"], ["--max-batch", "0"]]
)
def test_bad_arguments_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.arguments(given)
    assert ended.value.code == 2


def test_cameras_go_round_without_end(tiny_pack: Path) -> None:
    manifest = read_manifest(tiny_pack)
    cameras = Cameras(manifest, ("a", "b"))
    seen: dict[str, list[int]] = {"watch": [], "scene": []}
    for turn in range(100):
        for branch, (first, second) in cameras.due(turn):
            assert (first.key.source_id, second.key.source_id) == ("a", "b")
            assert first.missing_frames == 0
            seen[branch].append(first.key.index)
    # Hops of half a second and of one.
    assert seen == {"watch": list(range(100)), "scene": list(range(50))}


def test_utilisation_is_read_by_the_command_where_there_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_load.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gpu_load.Unmeasured, match="pip install nvidia-ml-py"):
        gpu_load.open_probe()
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 37\n")
    command.chmod(0o755)
    probe = gpu_load.open_probe()
    assert probe() == 37.0
    command.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(gpu_load.Unmeasured, match="nvidia-smi fails"):
        probe()
    with gpu_load.watched(probe) as watch:
        deadline_s = time.monotonic() + 180
        while watch.trouble is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert "nvidia-smi fails" in str(watch.trouble)
    assert watch.mean is None
