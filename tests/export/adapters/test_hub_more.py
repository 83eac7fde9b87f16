"""SegFormer, AST and X-CLIP of transformers: the pack equals the library's processor and model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.manifest import HeadKind
from engines.parity import read_parity
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions
from export.adapters.transformers import ast_front
from export.build import ExportError
from export.clips import open_recording
from export.model import export_model
from tests.export.adapters import hub

Run = Callable[[Path, Tensors], dict[str, Array]]


def test_segformer_gives_masks_of_the_frame(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    torch.manual_seed(2)
    folder = hub.segformer(tmp_path / "model")
    manifest = export_model(str(folder), tmp_path / "pack", clips=None)
    (branch,) = manifest.branches
    assert branch.heads[0].kind is HeadKind.SEGMENTATION and branch.heads[0].labels == hub.LABELS
    assert branch.video is not None and (branch.video.width, branch.video.height) == (64, 48)
    frames = pictures(3, 1, 48, 64, 3)
    lib = hub.library()
    processor = lib.AutoImageProcessor.from_pretrained(folder)
    network = lib.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    with torch.inference_mode():
        answer = network(**processor(list(frames[:, 0]), return_tensors="pt"))
    masks = processor.post_process_semantic_segmentation(answer, target_sizes=[(48, 64)] * 3)
    want = np.stack([mask.numpy() for mask in masks])
    got = run(tmp_path / "pack", {"frames": frames})["segmentation"]
    assert got.dtype == np.uint8 and len(np.unique(want)) > 1
    assert (got == want).mean() > 0.999


def test_xclip_scores_the_stated_texts(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    torch.manual_seed(3)
    folder = hub.xclip(tmp_path / "model")
    texts = ["running", "sitting down", "waving"]
    stated = tmp_path / "more.yaml"
    stated.write_text(f"video: {{fps: 8}}\nheads: {{gesture: {{labels: {texts}}}}}\n")
    with pytest.raises(ExportError, match=r"do not say heads.action.labels, video.fps"):
        export_model(str(folder), tmp_path / "pack", clips=None)
    manifest = export_model(str(folder), tmp_path / "pack", options=ExportOptions(describe=stated), clips=None)
    assert manifest.branches[0].heads[0].labels == tuple(texts)
    frames = pictures(3, 4, 32, 32, 3)
    lib = hub.library()
    processor = lib.AutoImageProcessor.from_pretrained(folder)
    tokens = lib.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    network = lib.AutoModel.from_pretrained(folder).eval()
    pixels = torch.cat([processor(list(clip), return_tensors="pt")["pixel_values"] for clip in frames])
    with torch.inference_mode():
        want = network(pixel_values=pixels, **tokens).logits_per_video.numpy()
    got = run(tmp_path / "pack", {"frames": frames})["gesture"]
    assert np.ptp(want, axis=0).max() > 1e-2
    assert np.abs(got - want).max() < 1e-3
    names = [tensor.name for tensor in manifest.graphs[0].inputs]
    assert names == ["frames"], "texts are part of the graph"


def test_ast_hears_as_the_library_does(tmp_path: Path, clip: Path, run: Run) -> None:
    torch.manual_seed(4)
    folder = hub.spectrogram(tmp_path / "model")
    manifest = export_model(str(folder), tmp_path / "pack", clips=[clip])
    (branch,) = manifest.branches
    assert branch.video is None and branch.audio is not None and branch.heads[0].kind is HeadKind.CLASS
    assert branch.window_ns == 640_000_000
    report = read_parity(tmp_path / "pack")
    assert report is not None
    # In bf16 a spectrum's quiet bands drown in the loud ones; whether that will do is for the bound to say.
    exact = [entry for entry in report.entries if entry.precision == "fp32"]
    assert exact and all(entry.passed for entry in exact)
    audio = np.stack([sounds(10_240)[name] for name in ("noise", "tone", "offset")])
    lib = hub.library()
    extractor = lib.AutoFeatureExtractor.from_pretrained(folder)
    network = lib.AutoModelForAudioClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        want = network(**extractor(list(audio), sampling_rate=16_000, return_tensors="pt")).logits.numpy()
    got = run(tmp_path / "pack", {"audio": audio})["class"]
    assert np.ptp(want, axis=0).max() > 1e-2
    assert np.abs(got - want).max() < 1e-3


def sounds(count: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    time = np.arange(count) / 16_000
    made = {
        "silence": np.zeros(count),
        "noise": random.uniform(-1, 1, count),
        "faint": 1e-3 * random.standard_normal(count),
        "tone": 0.9 * np.sin(2 * np.pi * 440 * time),
        "offset": 0.5 + 1e-3 * random.standard_normal(count),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


@pytest.mark.parametrize("count", [400, 10_240, 20_000])
@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
def test_the_mel_front_end_equals_the_feature_extractor(count: int) -> None:
    extractor = hub.library().ASTFeatureExtractor(max_length=100)
    front = ast_front(extractor)
    for name, audio in sounds(count).items():
        want = extractor(audio, sampling_rate=16_000, return_tensors="np")["input_values"][0]
        got = front(torch.from_numpy(audio)[None])[0].numpy()
        assert got.shape == want.shape == (100, 128)
        assert np.abs(got - want).max() < 1e-3, name


def test_a_recording_shorter_than_the_window_will_do(tmp_path: Path, clip: Path) -> None:
    from engines.errors import ParityMissing
    from engines.manifest import AudioInput, Branch, Head, Mode
    from export.clips import windows_of

    def branch(seconds: int) -> Branch:
        head = Head(name="a", kind=HeadKind.CLASS, output="a", labels=("x",), activation="softmax")
        length = seconds * 1_000_000_000
        return Branch(
            name="main",
            mode=Mode.CLIP,
            window_ns=length,
            hop_ns=length,
            audio=AudioInput(sample_rate=16_000),
            graph="network",
            heads=(head,),
        )

    recording = open_recording(clip)
    windows = windows_of([recording], branch(10), 3)[0]
    first = windows[0]
    assert first.audio is not None and first.audio.shape == (160_000,)
    assert first.audio_mask == pytest.approx(0.3, abs=0.01)
    assert np.abs(first.audio[:40_000]).max() > 0.2 and not first.audio[50_000:].any()
    with pytest.raises(ParityMissing, match="no clip is as long"):
        windows_of([recording], branch(20), 3)
