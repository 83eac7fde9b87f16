"""A checkpoint's report on a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from models.calibration import Calibration, HeadCalibration, LabelThreshold
from models.checkpoint import ModelCard, save_model
from models.config import AudioConfig, FusionConfig, HeadConfig, ModelConfig, TextConfig, VideoConfig
from models.errors import DataError, WeightsError
from models.evaluate import evaluate_checkpoint
from models.media import read_audio
from models.network import FusionModel, build_model
from models.text import TextTokenizer
from models.types import Inputs

LABELS = ("low", "high", "hiss")
TONES = {"low": 300.0, "high": 2500.0}
SECONDS = (2.0, 3.0, 2.0, 4.0, 2.0, 2.5)
CALIBRATION = Calibration(
    heads={"sound": HeadCalibration(temperature=0.05, thresholds={"low": LabelThreshold(on=0.5, off=0.3)})}
)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones and noise, and their table."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = ["path,split,group,label:sound,caption"]
    for n, seconds in enumerate(SECONDS):
        label = LABELS[n % 3]
        write_sound(folder / f"{n}.flac", label, seconds, n)
        lines.append(f"{n}.flac,val,g{n // 2},{label},a {label} sound")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_sound(path: Path, label: str, seconds: float, seed: int) -> None:
    count = round(16_000 * seconds)
    if label in TONES:
        wave = 9000 * np.sin(2 * np.pi * TONES[label] * np.arange(count) / 16_000)
    else:
        wave = np.random.default_rng(seed).normal(0, 3000, count)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        for first in range(0, count, 4096):
            frame = av.AudioFrame.from_ndarray(wave[None, first : first + 4096].astype(np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 16_000, first
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def model_config(*, text: bool = False) -> ModelConfig:
    heads = [HeadConfig(name="sound", kind="class", labels=LABELS)]
    if text:
        heads.append(HeadConfig(name="clip", kind="embedding"))
    return ModelConfig(
        audio=AudioConfig(widths=(4, 8), dropout=0.0),
        text=TextConfig(width=16, layers=1, heads=2, vocabulary=64) if text else None,
        fusion=FusionConfig(width=16, dropout=0.0),
        embedding=8,
        heads=tuple(heads),
    )


def store(folder: Path, config: ModelConfig, tokenizer: TextTokenizer | None = None) -> FusionModel:
    torch.manual_seed(3)
    size = None if tokenizer is None else tokenizer.vocabulary
    model = build_model(config, size).eval()
    card = ModelCard(
        name="tiny",
        model=config,
        window_s=2.0,
        hop_s=1.0,
        vocabulary=size,
        tokenizer=None if tokenizer is None else "tokenizer.json",
        calibration=CALIBRATION,
    )
    save_model(folder, model, card, tokenizer)
    return model


def evaluate(folder: Path, table: Path, **options: object) -> dict[str, float | None]:
    told: list[tuple[object, ...]] = []
    settings = {"cache": table.parent / "cache", "draws": 20, "report": lambda *args: told.append(args)} | options
    found = evaluate_checkpoint(folder, table, **settings)  # type: ignore[arg-type]
    assert told[-1][1] == told[-1][2]
    return found


def by_hand(model: FusionModel, folder: Path) -> np.ndarray:
    """Mean probability of each sound's windows, from the whole sound decoded at once."""
    rows = []
    for n, seconds in enumerate(SECONDS):
        wave = read_audio(folder / f"{n}.flac")
        assert wave is not None
        starts = range(0, round((seconds - 2) * 16_000) + 1, 16_000)
        batch = torch.from_numpy(np.stack([wave[at : at + 32_000] for at in starts]))
        with torch.inference_mode():
            logits = model(Inputs(audio=batch, audio_mask=torch.ones(len(batch)))).logits["sound"]
        rows.append(torch.softmax(logits / CALIBRATION.temperature("sound"), dim=1).mean(dim=0).numpy())
    return np.stack(rows)


def test_numbers_are_those_of_the_windows_means(sounds: Path, tmp_path: Path) -> None:
    model = store(tmp_path, model_config())
    scores = by_hand(model, sounds)
    truth = np.arange(len(SECONDS)) % 3
    found = evaluate(tmp_path, sounds / "table.csv", out=tmp_path / "report")
    assert found["sound_accuracy"] == pytest.approx((scores.argmax(axis=1) == truth).mean(), abs=1e-4)
    correct, sure = scores.argmax(axis=1) == truth, scores.max(axis=1)
    bins = np.ceil(sure * 10)
    error = sum(abs(sure[bins == b].mean() - correct[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    assert found["sound_ece"] == pytest.approx(error, abs=1e-3)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == found
    assert "# Report: tiny" in (tmp_path / "report" / "report.md").read_text()


def test_twice_the_same(sounds: Path, tmp_path: Path) -> None:
    store(tmp_path, model_config())
    assert evaluate(tmp_path, sounds / "table.csv") == evaluate(tmp_path, sounds / "table.csv")


def test_learning_curves_are_in_the_report(sounds: Path, tmp_path: Path) -> None:
    store(tmp_path, model_config())
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n{"epoch": 2, "loss": 0.5}\n')
    evaluate(tmp_path, sounds / "table.csv", out=tmp_path / "report")
    assert "history.png" in (tmp_path / "report" / "report.md").read_text()


def test_captions_ask_for_their_clips(sounds: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train([f"a {label} sound" for label in LABELS], 64)
    store(tmp_path, model_config(text=True), tokenizer)
    found = evaluate(tmp_path, sounds / "table.csv")
    # Each caption is that of two of the six clips.
    assert found["clip_r1_baseline"] == pytest.approx(2 / 6, abs=1e-4)
    assert found["clip_r5"] == 1.0


def test_pictures_with_masks(tmp_path: Path) -> None:
    config = ModelConfig(
        video=VideoConfig(width=32, height=32, frames=1),
        fusion=FusionConfig(width=8),
        embedding=8,
        heads=(HeadConfig(name="scene", kind="segmentation", labels=("dark", "light")),),
    )
    store(tmp_path / "run", config)
    lines = ["path,mask,split"]
    for n in range(3):
        half = np.zeros((32, 32, 3), np.uint8)
        half[:, 8 * (n + 1) :] = 255
        write_picture(tmp_path / f"{n}.png", half)
        write_picture(tmp_path / f"{n}_mask.png", half[..., 0] // 255)
        lines.append(f"{n}.png,{n}_mask.png,test")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    found = evaluate(tmp_path / "run", tmp_path / "table.csv", out=tmp_path / "report")
    assert found["scene_pixel_accuracy_baseline"] == 0.5
    assert 0.0 <= (found["scene_miou"] or 0.0) <= 1.0
    assert (tmp_path / "report" / "scene_examples.png").is_file()


def write_picture(path: Path, pixels: np.ndarray) -> None:
    form = "gray" if pixels.ndim == 2 else "rgb24"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = form
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, form)))
        container.mux(stream.encode(None))


def test_bad_input_is_one_line(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no trained model in .*model\.json is absent"):
        evaluate(tmp_path / "none", sounds / "table.csv")
    store(tmp_path, model_config())
    bad = sounds / "bad.csv"
    bad.write_text("path,label:sound\n0.flac,low\n1.flac,bark\n")
    with pytest.raises(DataError, match=r"bad\.csv:3: unknown label 'bark' of head sound; known are low, high, hiss"):
        evaluate(tmp_path, bad)
    bad.write_text("path,label:other\n0.flac,low\n")
    with pytest.raises(DataError, match=r"bad\.csv: no row of split train says anything of the heads sound"):
        evaluate(tmp_path, bad)
