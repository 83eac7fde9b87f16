"""Parity measured on real clips: what is cut from them, and that a wrong graph is found out."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from engines.backends import installed
from engines.errors import ManifestError, ParityFailed, ParityMissing
from engines.fake import FakeEngine
from engines.manifest import file_sha256, read_manifest, write_manifest
from engines.open import open_pack
from engines.parity import read_parity
from engines.tinypack import REFERENCES, encode, write_tiny_pack
from engines.types import Array, Tensors
from export.clips import cut_windows, default_clips, open_recording
from export.parity import run_parity

FPS, SECONDS, RATE = 10, 4, 16_000


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds at 10 fps: frame n is grey of level 6n; a tone from the first second on."""
    path = tmp_path_factory.mktemp("clips") / "ramp.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for n in range(FPS * SECONDS):
            picture = np.full((48, 64, 3), 6 * n, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            level = 8000 if n >= FPS else 0
            samples = np.full((1, RATE // FPS), level, np.int16)
            sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            sound.sample_rate, sound.pts = RATE, n * RATE // FPS
            out.mux(audio.encode(sound))
        out.mux(video.encode())
        out.mux(audio.encode())
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_pack(tmp_path / "tiny", parity=False)
    return tmp_path / "tiny"


def test_windows_hold_the_frames_on_show_and_their_lookback(clip: Path, tiny: Path) -> None:
    watch, scene = read_manifest(tiny).branches
    recording = open_recording(clip)
    assert len(recording.pts_ns) == FPS * SECONDS
    first, *_, last = cut_windows(recording, watch, 3)
    assert first.frames is not None and last.frames is not None
    # Sampled every 250 ms from frames every 100 ms; the earlier frame is the one on show 60 ms before.
    numbers = [int(t * FPS) for t in np.arange(8) * 0.25]
    earlier = [0, 1, 4, 6, 9, 11, 14, 16]
    np.testing.assert_allclose(first.frames[:, 1].mean(axis=(1, 2, 3)), [6 * n for n in numbers], atol=2)
    np.testing.assert_allclose(first.frames[:, 0].mean(axis=(1, 2, 3)), [6 * n for n in earlier], atol=2)
    assert last.frames[-1, 1].mean() > first.frames[-1, 1].mean()
    (only,) = cut_windows(recording, scene, 1)
    assert only.frames is not None and only.frames.shape == (1, 32, 32, 3)


def test_sound_is_cut_on_the_same_timeline(clip: Path, tiny: Path) -> None:
    watch = read_manifest(tiny).branches[0]
    first, *_ = cut_windows(open_recording(clip), watch, 3)
    assert first.audio is not None and first.audio.shape == (2 * RATE,)
    assert first.audio_mask == 1
    assert np.flatnonzero(first.audio > 0.2)[0] == pytest.approx(RATE, abs=2)


def test_half_the_frames_can_be_missing(clip: Path, tiny: Path) -> None:
    window = cut_windows(open_recording(clip), read_manifest(tiny).branches[0], 1)[0].with_missing_half()
    assert window.frame_mask is not None
    assert window.frame_mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_every_backend_is_measured_and_the_pack_then_opens(clip: Path, tiny: Path) -> None:
    report = run_parity(tiny, REFERENCES, [clip], batch_sizes=(1, 2), reference_name="numpy")
    assert read_parity(tiny) == report
    assert {(entry.graph, entry.backend) for entry in report.entries} == {
        (graph, backend) for graph in REFERENCES for backend in installed("cpu")
    }
    assert all(entry.passed for entry in report.entries)
    assert [latency.batch for latency in report.entries[0].latency] == [1, 2]
    assert [(used.name, used.sha256, used.windows) for used in report.clips] == [("ramp.mkv", file_sha256(clip), 8)]
    open_pack(tiny, backend="onnxruntime").close()


def test_a_graph_that_computes_something_else_fails(clip: Path, tiny: Path) -> None:
    def brighter(inputs: Tensors) -> dict[str, Array]:
        return {"features": encode(inputs)["features"] + np.float32(0.01)}

    report = run_parity(tiny, REFERENCES | {"watch_encoder": brighter}, [clip], batch_sizes=())
    entry = report.entry(read_manifest(tiny).graph("watch_encoder"), "onnxruntime", "fp32")
    assert entry is not None and not entry.passed
    assert entry.max_abs_error == pytest.approx(0.01, rel=0.01)
    # The window graph is right, but what it is fed with is off: its error is that of the chain.
    window = report.entry(read_manifest(tiny).graph("watch_window"), "onnxruntime", "fp32")
    assert window is not None and window.max_abs_error == pytest.approx(0.4, rel=0.01)
    with pytest.raises(ParityFailed, match=r"features is off by 0\.01"):
        open_pack(tiny, backend="onnxruntime")


def test_a_reference_is_given_the_inputs_of_its_graph_and_no_others(clip: Path, tiny: Path) -> None:
    manifest = read_manifest(tiny)
    strict = {graph.name: FakeEngine("tiny", graph, REFERENCES[graph.name]).infer for graph in manifest.graphs}
    report = run_parity(tiny, strict, [clip], batch_sizes=())
    assert all(entry.passed for entry in report.entries)


def test_a_reference_for_every_graph_is_needed(clip: Path, tiny: Path) -> None:
    with pytest.raises(ManifestError, match=r"no reference for graphs \['scene_window', 'watch_window'\]"):
        run_parity(tiny, {"watch_encoder": encode}, [clip])


def test_clips_that_cannot_be_used(clip: Path, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    with pytest.raises(ParityMissing, match=r"clip notes.mp4 cannot be read as video .*give another file"):
        run_parity(tiny, REFERENCES, [text])
    with pytest.raises(ParityMissing, match=r"clip gone.mp4 cannot be read"):
        run_parity(tiny, REFERENCES, [tmp_path / "gone.mp4"])
    manifest = read_manifest(tiny)
    long = manifest.branches[0].model_copy(update={"window_ns": 60_000_000_000})
    write_manifest(tiny, manifest.model_copy(update={"branches": (long, manifest.branches[1])}))
    with pytest.raises(ParityMissing, match=r"no clip is as long as the window of branch watch \(60 s\)"):
        run_parity(tiny, REFERENCES, [clip])


def test_precisions_that_a_backend_lacks_are_left_out(clip: Path, tiny: Path) -> None:
    manifest = read_manifest(tiny)
    write_manifest(tiny, manifest.model_copy(update={"parity_bounds": {"fp32": 1e-3, "bf16": 1.0}}))
    report = run_parity(tiny, REFERENCES, [clip], batch_sizes=())
    assert ("onnxruntime", "bf16") not in {(entry.backend, entry.precision) for entry in report.entries}
    assert ("onnxruntime", "fp32") in {(entry.backend, entry.precision) for entry in report.entries}


def test_the_clips_that_every_user_can_get() -> None:
    try:
        bikes, bunny, carphone = default_clips()
    except ParityMissing as error:
        pytest.skip(str(error))
    assert (bikes.name, bunny.name, carphone.name) == ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
    assert open_recording(bikes).duration_ns > 9e9
