"""A module of the user's own, from factory and safetensors to a pack."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engines.manifest import MANIFEST_FILE, HeadKind, Modality, file_sha256
from engines.open import open_pack
from engines.parity import read_parity
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions
from export.build import ExportError
from export.model import export_model

Run = Callable[[Path, Tensors], dict[str, Array]]

SOURCE = '''
import torch
from torch import nn

class Net(nn.Module):
    """Pictures and sound to scores, and an embedding."""
    def __init__(self, labels=3):
        super().__init__()
        self.see = nn.Conv3d(3, 4, 3, padding=1)
        self.hear = nn.Linear(1600, 4)
        self.say = nn.Linear(8, labels)
    def forward(self, pixels, waveform):
        seen = torch.relu(self.see(pixels)).mean(dim=(2, 3, 4))
        both = torch.cat([seen, torch.relu(self.hear(waveform[:, 0]))], dim=1)
        return {"vector": both, "scores": torch.sigmoid(self.say(both))}

def build():
    return Net()

def hungry(size):
    return Net(size)

def number():
    return 3
'''
DESCRIPTION = """
version: "2"
licence: MIT
description: gestures
video: {width: 40, height: 36, crop: [32, 32], frames: 4, fps: 8, layout: BCTHW, channels: bgr,
        mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.25]}
audio: {sample_rate: 3200, layout: BCN}
hop_s: 0.25
heads:
  gesture: {kind: action, labels: [wave, point, other], background: [other], activation: sigmoid, temperature: 1.5,
            output: scores, gives: probabilities, thresholds: {wave: {on: 0.8, off: 0.5}}}
  place: {kind: embedding, output: vector}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder: code, weights, description; also the current one."""
    (tmp_path / "own_net.py").write_text(SOURCE)
    (tmp_path / "net.yaml").write_text(DESCRIPTION)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file(own_net().state_dict(), tmp_path / "net.safetensors")
    return tmp_path


def own_net() -> nn.Module:
    from export.adapters.module import build

    return build("own_net:build")


def options(here: Path, **changes: Path) -> ExportOptions:
    given = {"weights": here / "net.safetensors", "describe": here / "net.yaml"} | changes
    return ExportOptions(**given)


def test_a_module_becomes_a_pack_that_opens_and_equals_it(here: Path, clip: Path, run: Run) -> None:
    lines: list[str] = []
    out = here / "pack"
    manifest = export_model("own_net:build", out, options=options(here), clips=[clip], progress=lines.append)
    assert (manifest.name, manifest.version, manifest.licence) == ("own_net-build", "2", "MIT")
    assert manifest.checkpoint_sha256 == file_sha256(here / "net.safetensors")
    (branch,) = manifest.branches
    assert (branch.window_ns, branch.hop_ns) == (500_000_000, 250_000_000)
    assert branch.audio is not None and branch.audio.samples_in(branch.window_ns) == 1600
    gesture, place = branch.heads
    assert (gesture.kind, gesture.temperature, gesture.background) == (HeadKind.ACTION, 1.5, ("other",))
    assert place.kind is HeadKind.EMBEDDING and Modality.TEXT not in gesture.without
    assert all(tensor.shape[0] == "batch" for graph in manifest.graphs for tensor in (*graph.inputs, *graph.outputs))
    report = read_parity(out)
    assert report is not None and report.entries and all(entry.passed for entry in report.entries)
    open_pack(out, backend="onnxruntime").close()
    assert lines[0] == "reading own_net:build" and "exporting network" in lines
    _equals(here, out, run)


def _equals(here: Path, out: Path, run: Run) -> None:
    random = np.random.default_rng(1)
    frames = random.integers(0, 256, (3, 4, 36, 40, 3), np.uint8)
    audio = random.uniform(-1, 1, (3, 1600)).astype(np.float32)
    seen = frames[:, :, 2:34, 4:36, ::-1].astype(np.float64) / 255
    pixels = ((seen - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]).transpose(0, 4, 1, 2, 3)
    net = own_net()
    from safetensors.torch import load_file

    net.load_state_dict(load_file(here / "net.safetensors"))
    with torch.inference_mode():
        want = net(torch.from_numpy(pixels).float(), torch.from_numpy(audio)[:, None])
    got = run(out, {"frames": frames, "audio": audio})
    assert np.abs(1 / (1 + np.exp(-got["gesture"])) - want["scores"].numpy()).max() < 1e-5
    assert np.abs(got["place"] - want["vector"].numpy()).max() < 1e-4


def refused(here: Path, message: str, what: str = "own_net:build", **changes: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(what, here / "pack", options=options(here, **changes), clips=None)
    assert "\n" not in str(caught.value)
    assert not (here / "pack" / MANIFEST_FILE).exists()


def described(here: Path, old: str, new: str) -> Path:
    path = here / "other.yaml"
    assert old in DESCRIPTION
    path.write_text(DESCRIPTION.replace(old, new))
    return path


def test_what_is_described_must_be_so(here: Path) -> None:
    fewer = described(here, "labels: [wave, point, other]", "labels: [wave, other]")
    refused(here, "head gesture gives 3 scores for 2 labels; correct its labels", describe=fewer)
    wrong = described(here, "layout: BCTHW", "layout: BTCHW")
    refused(here, r"does not take frames \[2, 4, 36, 40, 3\], audio .*correct layout", describe=wrong)
    other = described(here, "output: vector", "output: centre")
    refused(here, "does not take .*no 'centre'", describe=other)
    mask = described(here, "kind: embedding, output: vector", "kind: segmentation, output: vector, labels: [a, b]")
    refused(here, r"head place comes out as \[2\], not a mask", describe=mask)
    silent = described(here, "mean: [0.4, 0.5, 0.6], ", "")
    refused(here, r"do not say video.mean; state it in .*other.yaml too", describe=silent)


def test_weights_that_do_not_fit(here: Path) -> None:
    state = own_net().state_dict()
    save_file({**state, "say.weight": torch.zeros(5, 8)}, here / "five.safetensors")
    refused(
        here, r"five.safetensors: say.weight is \[5, 8\], the model's is \[3, 8\]", weights=here / "five.safetensors"
    )
    save_file({name: value for name, value in state.items() if name != "see.bias"}, here / "less.safetensors")
    refused(here, "less.safetensors has no parameter see.bias", weights=here / "less.safetensors")
    save_file({**state, "tail": torch.zeros(1)}, here / "more.safetensors")
    refused(here, "more.safetensors has a parameter tail too many", weights=here / "more.safetensors")
    refused(here, "no weights at .*gone.safetensors", weights=here / "gone.safetensors")
    whole = (here / "net.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(here, "cut.safetensors is not a whole safetensors file", weights=here / "cut.safetensors")
    save_file({**state, "say.bias": torch.full((3,), torch.nan)}, here / "nan.safetensors")
    refused(here, "head gesture gives NaN", weights=here / "nan.safetensors")


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["trap.pth", "trap.safetensors"])
def test_a_pickle_is_not_read(here: Path, name: str) -> None:
    sprung = here / "sprung"
    (here / name).write_bytes(pickle.dumps(_Trap(str(sprung))))
    refused(here, f"{name} is a pickle", weights=here / name)
    torch.save({"say.weight": _Trap(str(sprung))}, here / name)
    refused(here, f"{name} is a pickle", weights=here / name)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("own_net:gone", "own_net:gone cannot be imported .*gone"),
        ("no_such_net:build", "no_such_net:build cannot be imported"),
        ("own_net:hungry", "own_net:hungry fails .*size"),
        ("own_net:number", "own_net:number gives int, not a torch.nn.Module"),
        ("nothing", "no model 'nothing'; give a folder"),
    ],
)
def test_what_is_named_must_be_a_module(here: Path, what: str, message: str) -> None:
    refused(here, message, what)


def test_a_module_needs_weights(here: Path) -> None:
    with pytest.raises(ExportError, match=r"needs its weights; give a safetensors file \(--weights FILE\)"):
        export_model("own_net:build", here / "pack", options=ExportOptions(describe=here / "net.yaml"))


def test_a_folder_that_cannot_be_written(here: Path) -> None:
    (here / "pack").write_text("a file")
    with pytest.raises(ExportError, match="pack cannot be written"):
        export_model("own_net:build", here / "pack", options=options(here), clips=None)
