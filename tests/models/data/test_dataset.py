"""Windows of a manifest, from the table to the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.backbones import frame
from models.backbones.temporal import FrameBackbone, random_trunk
from models.config import AudioConfig, AugmentConfig, DataConfig, HeadConfig, ModelConfig, TextConfig, VideoConfig
from models.data.collate import Sample, collate, collate_pairs
from models.data.dataset import ClipDataset
from models.data.features import FrozenFeatures
from models.data.manifest import read_manifest
from models.errors import DataError
from models.text import TextTokenizer
from models.tokens import END, START
from models.types import VOID, Inputs, Targets

ACTION = HeadConfig(name="action", kind="action", labels=("run", "walk"))
SCENE = HeadConfig(name="scene", kind="action", labels=("day", "rain"), multi_label=True)
STREET = HeadConfig(name="street", kind="segmentation", labels=("road", "sky"))
TALK = HeadConfig(name="talk", kind="dialogue")
VIDEO = VideoConfig(width=32, height=32, frames=4)
STILL = AugmentConfig(crop=0, flip=0, colour=0, time_jitter_s=0, speed=0, gain_db=0, noise=0)
TABLE = (
    "path,label:action,label:scene,caption,split\n"
    "a.mp4,run,day|rain,a runner,train\n"
    "b.mp4,walk,-,,train\n"
    "c.mp4,,,a walker,val\n"
)


@pytest.fixture
def folder(tmp_path: Path, make_clip: Callable[..., Path]) -> Path:
    """Three clips: 4 s with a tone, 1.5 s mute, 2 s with a tone."""
    make_clip(tmp_path / "a.mp4", 4.0, tone_hz=440.0)
    make_clip(tmp_path / "b.mp4", 1.5, level=100)
    make_clip(tmp_path / "c.mp4", 2.0, tone_hz=880.0)
    return tmp_path


def dataset(
    folder: Path,
    table: str = TABLE,
    model: ModelConfig | None = None,
    split: str | tuple[str, ...] = "train",
    *,
    training: bool = False,
    tokenizer: TextTokenizer | None = None,
    encoder: FrozenFeatures | None = None,
    seed: int = 0,
    **config: object,
) -> ClipDataset:
    path = folder / "m.csv"
    path.write_text(table)
    data = DataConfig(**{"manifest": path, "cache": folder / "cache", **config})  # type: ignore[arg-type]
    model = model or ModelConfig(video=VIDEO, audio=AudioConfig(), heads=(ACTION, SCENE))
    manifest = read_manifest(path, model.heads, every_class=False)
    return ClipDataset(manifest, data, model, tokenizer, split, training, seed=seed, encoder=encoder)  # type: ignore[arg-type]


def greys(sample: Sample) -> list[int]:
    """The mean grey of each frame."""
    assert sample.video is not None
    return [round(float(frame.float().mean())) for frame in sample.video]


def same(a: Sample, b: Sample) -> bool:
    assert a.video is not None and b.video is not None and a.audio is not None and b.audio is not None
    return torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio)


def test_samples_without_augmentation(folder: Path) -> None:
    windows = dataset(folder)
    assert [(w.row, w.start_ns / 1e9) for w in windows.windows] == [(0, 0.0), (0, 1.0), (0, 2.0), (1, 0.0)]
    second = windows[1]
    # At 10 fps frame n shows 4 n: samples at 1.0, 1.5, 2.0 and 2.5 s are frames 10, 15, 20 and 25.
    assert np.abs(np.array(greys(second)) - [40, 60, 80, 100]).max() <= 2
    assert second.video_mask.tolist() == [1, 1, 1, 1] and second.audio_mask == 1.0
    assert second.audio.shape == (32_000,) and 0.4 < second.audio.abs().max() <= 0.7
    short = windows[3]
    # 1.5 s of a 2 s window: the sample at 1.5 s takes the last frame, shown until then; no sound.
    assert short.video_mask.tolist() == [1, 1, 1, 1] and short.audio_mask == 0.0
    assert not short.audio.any()


def test_missing_ends_are_masked(folder: Path, make_clip: Callable[..., Path]) -> None:
    make_clip(folder / "d.mp4", 0.8, tone_hz=440.0)
    [sample] = [dataset(folder, "path,action\nd.mp4,run\n")[0]]
    assert sample.video_mask.tolist() == [1, 1, 1, 0] and not sample.video[3].any()
    assert sample.audio_mask == pytest.approx(0.4, abs=0.05)


def test_batches_are_as_the_contract_says(folder: Path) -> None:
    windows = dataset(folder, split=("train", "val"))
    inputs, targets = collate([windows[n] for n in range(len(windows))])
    assert inputs.video.shape == (5, 4, 32, 32, 3) and inputs.video.dtype == torch.uint8
    assert inputs.video_mask.shape == (5, 4) and inputs.audio.shape == (5, 32_000)
    assert inputs.audio_mask.shape == (5,) and inputs.tokens is None and inputs.question is None
    assert targets.heads["action"][:4].tolist() == [[1, 0], [1, 0], [1, 0], [0, 1]]
    assert targets.heads["scene"][[0, 3]].tolist() == [[1, 1], [0, 0]], "none of them is known to be none of them"
    assert targets.heads["action"][4].isnan().all() and targets.heads["scene"][4].isnan().all()
    assert targets.index.tolist() == [0, 0, 0, 1, 2] and targets.weight.tolist() == [1] * 5
    assert windows.label_counts("action").tolist() == [3, 1]
    assert windows.label_counts("scene").tolist() == [3, 3]


def test_labels_of_unlabelled_rows_are_not_seen(folder: Path) -> None:
    windows = dataset(folder, TABLE.replace("a runner,train", "a runner,unlabelled"), split=("train", "unlabelled"))
    assert windows[0].heads["action"].isnan().all() and windows[3].heads["action"].tolist() == [0, 1]
    assert windows.label_counts("action").tolist() == [0, 1]


def test_pairs_look_back(folder: Path) -> None:
    video = VideoConfig(width=32, height=32, frames=4, lookback_ms=250)
    windows = dataset(folder, model=ModelConfig(video=video, heads=(ACTION,)))
    first, second = windows[0], windows[1]
    assert first.video.shape == (4, 2, 32, 32, 3)
    # 250 ms before 1.0 s the newest frame is that of 0.7 s; before the first there is none, so no motion.
    assert round(float(second.video[0, 0].float().mean())) == pytest.approx(28, abs=2)
    assert round(float(second.video[0, 1].float().mean())) == pytest.approx(40, abs=2)
    assert torch.equal(first.video[0, 0], first.video[0, 1])


def test_random_changes_depend_on_seed_epoch_and_index_alone(folder: Path) -> None:
    first, again = (dataset(folder, training=True, seed=3) for _ in range(2))
    plain = dataset(folder)
    for windows in (first, again):
        windows.set_epoch(5)
    order = [2, 0, 3, 1]
    early = [first[n] for n in order]
    assert all(same(again[n], sample) for n, sample in zip(order, early, strict=True))
    assert not any(same(plain[n], sample) for n, sample in zip(order, early, strict=True))
    first.set_epoch(6)
    assert not any(same(first[n], sample) for n, sample in zip(order, early, strict=True))
    other = dataset(folder, training=True, seed=4)
    other.set_epoch(5)
    assert not same(other[2], early[0])


def test_workers_see_the_epoch(folder: Path) -> None:
    windows = dataset(folder, training=True)
    loader = DataLoader(windows, batch_size=4, num_workers=1, collate_fn=collate, persistent_workers=True)
    for epoch in range(2):
        windows.set_epoch(epoch)
        inputs, _ = next(iter(loader))
        here, _ = collate([windows[n] for n in range(4)])
        assert torch.equal(inputs.video, here.video) and torch.equal(inputs.audio, here.audio)


def test_jitter_and_speed_move_video_and_sound_together(folder: Path, make_clip: Callable[..., Path]) -> None:
    make_clip(folder / "e.mp4", 8.0, tone_hz=400.0)
    moved = STILL.model_copy(update={"time_jitter_s": 0.4, "speed": 0.15})
    windows = dataset(folder, "path,start,end,action\ne.mp4,1,7,run\n", training=True, augment=moved)
    speeds = set()
    for epoch in range(6):
        windows.set_epoch(epoch)
        sample = windows[2]
        crossings = int((torch.diff(torch.sign(sample.audio)) != 0).sum())
        heard = crossings / 2 / 2.0 / 400.0
        level = greys(sample)
        seen = (level[-1] - level[0]) / 4 / 10 / 1.5
        assert heard == pytest.approx(seen, abs=0.1)
        assert 0.84 < heard < 1.16
        speeds.add(round(heard, 2))
        assert sample.video_mask.all() and sample.audio_mask == 1.0
    assert len(speeds) > 3


def test_weak_and_strong_views(folder: Path) -> None:
    windows = dataset(folder, training=True)
    pairs = [windows.pair(n) for n in range(4)]
    (weak, _), (strong, targets) = collate_pairs(pairs)
    assert weak.video.shape == strong.video.shape and targets.index.tolist() == [0, 0, 0, 1]
    assert not torch.equal(weak.video, strong.video)
    assert all(same(strong_view, windows[n]) for n, (_, strong_view) in enumerate(pairs))


def test_text_and_dialogue(folder: Path) -> None:
    table = (
        "path,caption,question,answer\na.mp4,a man runs fast,Who runs?,a man\nb.mp4,,,\nc.mp4,a man,What is this?,\n"
    )
    tokenizer = TextTokenizer.train(["a man runs fast", "Who runs? What is this?"], 80)
    model = ModelConfig(video=VIDEO, text=TextConfig(max_tokens=8), heads=(TALK,))
    windows = dataset(folder, table, model, tokenizer=tokenizer, hop_s=4.0)
    inputs, targets = collate([windows[n] for n in range(3)])
    assert tokenizer.decode(inputs.tokens) == ["a man runs fast", "", "a man"]
    assert not inputs.tokens[1].any() and not inputs.question[1].any() and inputs.audio is None
    answer, reply = inputs.answer, targets.heads["talk"]
    assert answer[:, 0].tolist() == [START] * 3 and answer.shape == reply.shape
    assert torch.equal(answer[0, 1:3], reply[0, :2]) and reply[0, 2] == END
    assert (reply[1:] == VOID).all()
    assert windows.texts() == ["a man runs fast", "Who runs?", "a man", "a man", "What is this?"]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        dataset(folder, table, model)


def test_frozen_features_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One block a stage: exporting takes as long as there are layers.
    monkeypatch.setattr(frame, "LITE0", tuple(stage._replace(repeats=1) for stage in frame.LITE0))
    torch.manual_seed(0)
    video = VideoConfig(width=32, height=32, frames=4, lookback_ms=60, frozen=True)
    model = ModelConfig(video=video, heads=(ACTION,))
    backbone = FrameBackbone(random_trunk(), pairs=True).eval()
    encoder = FrozenFeatures(backbone.pretrained(), video, folder / "cache")
    plain = dataset(folder, model=model)
    windows = dataset(folder, model=model, encoder=encoder)
    wanted, _ = collate([plain[n] for n in range(4)])
    got, _ = collate([windows[n] for n in range(4)])
    with torch.no_grad():
        features = backbone.encode(wanted.video, wanted.video_mask)
    assert got.video.shape == (4, 4, 2560)
    assert torch.allclose(got.video, features, rtol=2e-3, atol=2e-3 * float(features.abs().max()))

    class Counting:
        checksum, features, calls = encoder.checksum, encoder.features, 0

        def encode(self, frames: np.ndarray) -> np.ndarray:
            self.calls += 1
            return encoder.encode(frames)

    counting = Counting()
    varied = dataset(folder, model=model, encoder=counting, training=True, feature_variants=2)  # type: ignore[arg-type]
    seen = []
    for epoch in range(4):
        varied.set_epoch(epoch)
        seen.append(varied[0].video)
    assert counting.calls == 2
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


@pytest.fixture
def street(folder: Path, make_picture: Callable[[Path, np.ndarray], Path]) -> Path:
    """A picture, dark on the left, with its mask: road on the left, sky on the right, a row without a class."""
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 1
    image = np.repeat((mask * 200)[..., None], 3, axis=2)
    mask[0] = 255
    make_picture(folder / "p.png", image)
    make_picture(folder / "mask.png", mask)
    return folder


SEGMENTS = ModelConfig(video=VIDEO, heads=(STREET, ACTION))


def test_pictures_with_masks(street: Path) -> None:
    windows = dataset(street, "path,mask,action\np.png,mask.png,run\na.mp4,,walk\n", SEGMENTS)
    inputs, targets = collate([windows[0], windows[1]])
    assert inputs.video_mask.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    mask = targets.heads["street"]
    assert mask.shape == (2, 32, 32) and mask.dtype == torch.int64
    assert (mask[0, 1:, :16] == 0).all() and (mask[0, 1:, 16:] == 1).all() and (mask[0, 0] == VOID).all()
    assert (mask[1] == VOID).all()
    shown = inputs.video[0, 3, 1:, :, 0].float()
    assert ((shown > 100) == (mask[0, 1:] == 1)).float().mean() > 0.95
    counts = windows.label_counts("street")
    assert counts.tolist() == [31 * 16, 31 * 16]


def test_masks_follow_their_picture(street: Path) -> None:
    windows = dataset(street, "path,mask\np.png,mask.png\n", SEGMENTS, training=True)
    edges = set()
    for epoch in range(8):
        windows.set_epoch(epoch)
        sample = windows[0]
        light, mask = sample.video[3, 4:, :, 0].float(), sample.heads["street"][4:]
        limit = (light.min() + light.max()) / 2
        assert ((light > limit) == (mask == 1)).float().mean() > 0.93
        edges.add((int(mask[5, 0]), int((mask[5] == 1).sum())))
    assert len(edges) > 3


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((48, 60), np.uint8), "is 60x48, its picture 64x48"),
        (np.full((48, 64), 2, np.uint8), "has index 2, the head has 2 labels"),
        (np.zeros((48, 64, 3), np.uint8), r"is a colour picture \(rgb24\)"),
    ],
)
def test_bad_masks_name_file_and_line(street: Path, make_picture, pixels: np.ndarray, message: str) -> None:
    make_picture(street / "bad.png", pixels)
    windows = dataset(street, "path,mask\np.png,mask.png\np.png,bad.png\n", SEGMENTS)
    with pytest.raises(DataError, match=message) as caught:
        windows[1]
    assert "m.csv:3: " in str(caught.value) and "bad.png" in str(caught.value)


def test_a_void_index_can_be_chosen(street: Path, make_picture) -> None:
    make_picture(street / "two.png", np.full((48, 64), 2, np.uint8))
    windows = dataset(street, "path,mask,void\np.png,two.png,2\n", SEGMENTS)
    assert (windows[0].heads["street"] == VOID).all()


def test_a_mask_goes_with_a_picture(street: Path) -> None:
    with pytest.raises(DataError, match=r"m\.csv:2: a mask goes with a picture, not with a\.mp4"):
        dataset(street, "path,mask\na.mp4,mask.png\n", SEGMENTS)


def test_what_the_model_takes_must_be_there(folder: Path) -> None:
    listens = ModelConfig(audio=AudioConfig(), heads=(ACTION,))
    with pytest.raises(DataError, match=r"m\.csv:3: .*b\.mp4 holds no sound, which the model takes"):
        dataset(folder, model=listens)
    inputs, _ = collate([dataset(folder, TABLE, listens, "val")[0]])
    assert inputs.video is None and inputs.audio.shape == (1, 32_000)


def test_sound_alone_among_videos(folder: Path, data: Path) -> None:
    sound = next(iter(sorted((data / "sounds" / "esc10").glob("*.flac"))))
    windows = dataset(folder, f"path,action\na.mp4,run\n{sound},walk\n", hop_s=4.0)
    inputs, _ = collate([windows[0], windows[1]])
    assert inputs.video_mask[1].sum() == 0 and not inputs.video[1].any()
    assert inputs.audio_mask.tolist() == [1, 1]


def test_broken_clips(folder: Path) -> None:
    (folder / "zero.mp4").write_bytes(b"")
    table = "path,action\na.mp4,run\nzero.mp4,walk\n"
    with pytest.raises(DataError, match=r"m\.csv:3: .*zero\.mp4 cannot be read"):
        dataset(folder, table)
    windows = dataset(folder, table, skip_broken=True)
    assert {w.row for w in windows.windows} == {0} and len(windows.skipped) == 1
    assert "zero.mp4" in windows.skipped[0]


def test_rows_outside_their_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"m\.csv:2: starts at 9 s, a\.mp4 ends at 4\.00 s"):
        dataset(folder, "path,start,action\na.mp4,9,run\n")
    with pytest.raises(DataError, match="no usable rows of split test"):
        dataset(folder, split="test")


def test_a_short_stretch_is_in_the_middle(folder: Path) -> None:
    windows = dataset(folder, "path,start,end,action\na.mp4,2,3,run\na.mp4,3.5,4,run\n")
    assert [w.start_ns / 1e9 for w in windows.windows] == [1.5, 2.0]


def test_real_recordings(data: Path, tmp_path: Path) -> None:
    clips = sorted((data / "actions" / "fights").glob("*.mp4"))[:3]
    (tmp_path / "m.csv").write_text("path,action\n" + "".join(f"{clip},run\n" for clip in clips))
    windows = dataset(tmp_path, (tmp_path / "m.csv").read_text(), training=True)
    inputs, targets = collate([windows[n] for n in range(len(windows))])
    assert isinstance(inputs, Inputs) and isinstance(targets, Targets)
    assert inputs.video_mask.mean() > 0.8 and inputs.video.float().std() > 10
