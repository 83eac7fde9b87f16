"""Models of `sightwire train` as packs: the graphs are the model, staged or whole, with each modality hidden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import backends
from engines.backends import EngineOptions
from engines.manifest import MANIFEST_FILE, HeadKind, Manifest, Modality, Mode
from engines.parity import read_parity
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions
from export.build import ExportError, PackToWrite, export_graph, reference
from export.model import export_model, read_model
from models.calibration import Calibration, HeadCalibration, LabelThreshold
from models.checkpoint import ModelCard, load_model, save_model
from models.config import AudioConfig, FusionConfig, HeadConfig, ModelConfig, TextConfig, VideoConfig
from models.network import FusionModel, build_model
from models.types import Inputs

Run = Callable[[Path, Tensors], dict[str, Array]]

ACTION = HeadConfig(name="act", kind="action", labels=("fall", "none"), background=("none",))
SEVERAL = HeadConfig(name="heard", kind="class", labels=("bell", "rain"), multi_label=True)
PLACE = HeadConfig(name="place", kind="embedding")
SCENE = HeadConfig(name="scene", kind="segmentation", labels=("road", "car", "sky"))
TALK = HeadConfig(name="talk", kind="dialogue")
AUDIO = AudioConfig(widths=(4, 4, 8, 8))
TEXT = TextConfig(max_tokens=8, vocabulary=100, width=16, layers=1, heads=2)
SIZE = {"width": 32, "height": 32, "frames": 4}


def trained(folder: Path, heads: tuple[HeadConfig, ...], *, fusion: str = "attention", **parts: Any) -> FusionModel:
    """A model as training leaves it, with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(fusion=FusionConfig.model_validate({"kind": fusion, "width": 16}), heads=heads, **parts)
    vocabulary = 100 if config.text is not None else None
    model = build_model(config, vocabulary, pretrained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("adapt.", "heads.")) and parameter.dim() == 2:
                parameter.mul_(3)
    found = HeadCalibration(temperature=2.0, thresholds={"fall": LabelThreshold(on=0.7, off=0.4)})
    card = ModelCard(
        name="own",
        model=config,
        window_s=2.0,
        hop_s=0.5,
        vocabulary=vocabulary,
        calibration=Calibration(heads={"act": found}),
    )
    save_model(folder, model, card, None)
    return load_model(folder)[0]


def exported(folder: Path, out: Path, clips: list[Path] | None = None) -> Manifest:
    return export_model(str(folder), out, clips=clips)


def sound(rows: int) -> Array:
    return np.random.default_rng(5).uniform(-0.5, 0.5, (rows, 32_000)).astype(np.float32)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackToWrite, FusionModel]:
    """Pairs of frames, sound, text and every kind of head; not written, since exporting the trunk takes long."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    video = VideoConfig(backbone="frame", lookback_ms=60, **SIZE)
    heads = (ACTION, SEVERAL, PLACE, SCENE, TALK)
    model = trained(folder, heads, video=video, audio=AUDIO, text=TEXT, embedding=8)
    return read_model(str(folder), ExportOptions(name="street")), model


def answer(pack: PackToWrite, graph: str, inputs: Tensors) -> dict[str, Array]:
    return dict(reference(next(item for item in pack.graphs if item.name == graph))(inputs))


def test_a_frame_backbone_is_staged(staged: tuple[PackToWrite, FusionModel]) -> None:
    pack, _ = staged
    assert pack.name == "street" and [graph.name for graph in pack.graphs] == ["encoder", "window", "segmentation"]
    watch, scene = pack.branches
    assert (watch.mode, watch.window_ns, watch.hop_ns) == (Mode.STAGED, 2_000_000_000, 500_000_000)
    assert watch.video is not None and watch.audio is not None
    assert watch.video.samples_in(watch.window_ns) == 4 and watch.video.lookback_ns == 60_000_000
    act, heard, place = watch.heads
    assert (act.activation, act.temperature, act.thresholds["fall"].off) == ("softmax", 2.0, 0.4)
    assert (heard.activation, heard.kind, place.kind) == ("sigmoid", HeadKind.CLASS, HeadKind.EMBEDDING)
    assert act.without == {Modality.VIDEO: "act_without_video", Modality.AUDIO: "act_without_audio"}
    assert scene.video is not None and scene.video.samples_in(scene.window_ns) == 1
    assert scene.video.lookback_ns is None and [head.name for head in scene.heads] == ["scene"]


def test_the_stages_equal_the_model(
    staged: tuple[PackToWrite, FusionModel], tmp_path: Path, pictures: Callable[..., Array]
) -> None:
    pack, model = staged
    frames, audio = pictures(2, 4, 2, 32, 32, 3), sound(2)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]], np.float32)
    heard = np.array([1, 0.5], np.float32)
    features = np.stack([answer(pack, "encoder", {"frames": clip})["features"] for clip in frames])
    fed = {"features": features * mask[:, :, None], "frame_mask": mask, "audio": audio, "audio_mask": heard}
    spec = export_graph(next(graph for graph in pack.graphs if graph.name == "window"), tmp_path)
    engine = backends.load(tmp_path / spec.file, pack.name, spec, "onnxruntime", EngineOptions(threads=1))
    got = engine.infer(fed)
    engine.close()
    given = (torch.from_numpy(value) for value in (frames, mask, audio, heard))
    inputs = Inputs(**dict(zip(("video", "video_mask", "audio", "audio_mask"), given, strict=True)))
    with torch.inference_mode():
        whole, blind, deaf = model(inputs), model.without(inputs, "video"), model.without(inputs, "audio")
    for name in ("act", "heard", "place"):
        assert np.abs(got[name] - whole.logits[name].numpy()).max() < 1e-4, name
    for name in ("act", "heard"):
        assert np.abs(got[f"{name}_without_video"] - blind.logits[name].numpy()).max() < 1e-4
        assert np.abs(got[f"{name}_without_audio"] - deaf.logits[name].numpy()).max() < 1e-4
    assert np.abs(got["act"] - got["act_without_video"]).max() > 1e-3, "hiding a modality should change the answer"


def test_masks_equal_those_of_the_newest_frame(
    staged: tuple[PackToWrite, FusionModel], pictures: Callable[..., Array]
) -> None:
    pack, model = staged
    frames = pictures(3, 1, 32, 32, 3)
    got = answer(pack, "segmentation", {"frames": frames})["scene"]
    pairs = torch.from_numpy(frames)[:, :, None].expand(-1, 4, 2, -1, -1, -1)
    with torch.inference_mode():
        want = model(Inputs(video=pairs)).logits["scene"].argmax(dim=1).numpy()
    assert got.dtype == np.uint8 and got.shape == (3, 32, 32)
    assert (got == want).mean() > 0.999


def test_a_backbone_that_mixes_time_is_run_on_clips(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    video = VideoConfig(backbone="r3d18", width_multiplier=0.1, **SIZE)
    model = trained(tmp_path / "run", (ACTION,), fusion="gated", video=video)
    manifest = exported(tmp_path / "run", tmp_path / "pack")
    (branch,) = manifest.branches
    assert branch.mode is Mode.CLIP and branch.audio is None and branch.heads[0].without == {}
    frames, mask = pictures(2, 4, 32, 32, 3), np.array([[1, 1, 1, 1], [0, 1, 1, 1]], np.float32)
    got = run(tmp_path / "pack", {"frames": frames, "frame_mask": mask})["act"]
    with torch.inference_mode():
        want = model(Inputs(video=torch.from_numpy(frames), video_mask=torch.from_numpy(mask))).logits["act"]
    assert np.abs(got - want.numpy()).max() < 1e-4


def test_sound_alone(tmp_path: Path, clip: Path, run: Run) -> None:
    model = trained(tmp_path / "run", (ACTION,), fusion="concat", audio=AUDIO)
    manifest = exported(tmp_path / "run", tmp_path / "pack", [clip])
    report = read_parity(tmp_path / "pack")
    assert report is not None
    exact = [entry for entry in report.entries if entry.precision == "fp32"]
    assert exact and all(entry.passed for entry in exact)
    (branch,) = manifest.branches
    assert branch.video is None and (branch.window_ns, branch.hop_ns) == (2_000_000_000, 500_000_000)
    audio, mask = sound(3), np.array([1, 0, 0.5], np.float32)
    got = run(tmp_path / "pack", {"audio": audio, "audio_mask": mask})["act"]
    with torch.inference_mode():
        want = model(Inputs(audio=torch.from_numpy(audio), audio_mask=torch.from_numpy(mask))).logits["act"]
    assert np.abs(got - want.numpy()).max() < 1e-4


def refused(folder: Path, message: str, options: ExportOptions | None = None) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(str(folder), folder.parent / "pack", options=options, clips=None)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "pack" / MANIFEST_FILE).exists()


def test_what_cannot_be_a_pack(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(folder, (ACTION,), fusion="concat", audio=AUDIO)
    refused(folder, "run describes itself; leave .*more.yaml out", ExportOptions(describe=tmp_path / "more.yaml"))
    refused(folder, "run holds its own weights; leave .*w out", ExportOptions(weights=tmp_path / "w"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64])
    refused(folder, "model.safetensors is not a whole safetensors file")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights at .*model.safetensors")
    trained(tmp_path / "words", (ACTION,), text=TEXT)
    refused(tmp_path / "words", "nothing in it answers about video or sound")
