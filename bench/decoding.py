"""Decoding: what our ingest costs beside a bare PyAV loop on the same clip.

(a) frames per second with every frame sampled, as fast as possible; (e) CPU time of one live source.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from bench.clip import FPS, Clip
from bench.common import BenchError, Measured, Row, interleaved, median_ratio
from engines.manifest import Manifest, VideoInput
from stream.accounting import Ledger
from stream.clock import SystemClock
from stream.ingest.file import FileSource
from stream.source_settings import Pace, SourceSettings
from stream.types import ClipWindow, Emit, MediaItem
from stream.windows import Grace, SourceWindows, Watch

Size = tuple[int, int]
"""Width and height in pixels."""

COMMON_SIZE: Size = (224, 224)
"""What most published networks take."""


def main_input(manifest: Manifest) -> VideoInput:
    """The video input of the pack's first branch that has one. Raises ``BenchError``."""
    for branch in manifest.branches:
        if branch.video is not None:
            return branch.video
    raise BenchError(f"pack {manifest.name} takes no video; give another --pack")


def audio_rate(manifest: Manifest) -> int | None:
    """Rate that the pack's audio is resampled to; ``None`` when it takes none."""
    return next((branch.audio.sample_rate for branch in manifest.branches if branch.audio is not None), None)


Scale = Callable[[VideoFrame, int, int], object]
"""Scales a frame to a width and height, RGB."""


def plain_scale(frame: VideoFrame, width: int, height: int) -> object:
    """What PyAV's documentation shows; it sets up a scaler for each frame."""
    return frame.to_ndarray(width=width, height=height, format="rgb24", interpolation=Interpolation.FAST_BILINEAR)


def tuned_scale() -> Scale:
    """The fastest there is: a scaler kept from frame to frame, on one thread, and no copy of what it writes."""
    scaler = VideoReformatter()

    def scale(frame: VideoFrame, width: int, height: int) -> object:
        return scaler.reformat(
            frame, width, height, format="rgb24", interpolation=Interpolation.FAST_BILINEAR, threads=1
        )

    return scale


def bare_loop(
    path: Path, size: Size, rate: int | None, scale: Scale, due: Callable[[float], None] | None = None
) -> int:
    """Decode a file with PyAV, scale every frame to RGB, resample the audio; returns the number of frames.

    ``due`` is called with each packet's time in seconds before it is decoded.
    """
    resampler, frames = None, 0
    if rate is not None:
        resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        streams = [video, *(container.streams.audio[:1] if rate is not None else ())]
        for packet in container.demux(streams):
            if due is not None and packet.dts is not None and packet.time_base is not None:
                due(float(packet.dts * packet.time_base))
            for frame in packet.decode():
                if isinstance(frame, VideoFrame):
                    scale(frame, *size)
                    frames += 1
                elif isinstance(frame, AudioFrame) and resampler is not None:
                    resampler.resample(frame)
    return frames


def our_ingest(path: Path, inputs: Sequence[VideoInput], rate: int | None, pace: Pace, emit: Emit) -> FileSource:
    """Run our file source to the end; returns it for its counts."""
    settings = SourceSettings.model_validate({"id": "bench", "url": str(path), "pace": pace})
    source = FileSource(settings, tuple(inputs), rate, SystemClock())
    source.run(emit, threading.Event())
    return source


def throughput(clip: Clip, manifest: Manifest, runs: int) -> Measured:
    """(a) Frames per second of bare PyAV and of our ingest, every frame sampled."""
    video, rate = main_input(manifest), audio_rate(manifest)
    size = (video.width, video.height)
    every_frame = VideoInput(width=video.width, height=video.height, fps=Fraction(FPS))

    def ours() -> float:
        source = our_ingest(clip.path, [every_frame], rate, Pace.FAST, lambda item: None)
        return float(source.stats.frames_emitted)

    sides = (partial(_per_second, lambda: bare_loop(clip.path, size, rate, tuned_scale())), partial(_per_second, ours))
    for side in sides:
        side()
    bare_fps, ours_fps = interleaved(runs, *sides)
    return Measured(
        (
            Row("decode_fps_bare", statistics.median(bare_fps), f"bare PyAV, decode + scale to {size}", "frames/s"),
            Row("ingest_fps", statistics.median(ours_fps), "our ingest, every frame sampled", "frames/s"),
            Row("ingest_ratio", median_ratio(ours_fps, bare_fps), "ours / bare", at_least=0.90),
        ),
        (
            f"{clip.seconds} s of 640x360 at {FPS} fps (from {clip.origin}); FAST_BILINEAR, one decoder thread; "
            f"both sides decode the AAC track and resample it to {rate or 0} Hz.",
            f"Median of {runs} interleaved pairs.",
        ),
    )


def _per_second(count: Callable[[], float]) -> float:
    begin = time.perf_counter()
    counted = count()
    return counted / (time.perf_counter() - begin)


def live_cpu(clip: Clip, manifest_file: Path, runs: int, seconds: float) -> Measured:
    """(e) CPU time of one live source through our ingest and windows, and of plain loops on the same stream.

    Each side runs in a process of its own, all in the same seconds, so that they meet the same machine.
    """
    manifest = Manifest.model_validate_json(manifest_file.read_bytes())
    video = main_input(manifest)
    main, common = _text(video.width, video.height), _text(*COMMON_SIZE)
    sides = ("ours", f"plain {main}", f"plain {common}", f"tuned {main}")
    spent = [_side_by_side(clip, manifest_file, sides, seconds) for _ in range(runs)]
    ours, plain, plain_common, tuned = ([run[side] for run in spent] for side in range(len(sides)))
    share = [100 * statistics.median(side) / seconds for side in (ours, plain, plain_common, tuned)]
    return Measured(
        (
            Row("cpu_live_source_pct", share[0], "our ingest and windows, one live source", "% of a core"),
            Row("cpu_plain_loop_pct", share[1], f"plain loop, every frame to {main}", "% of a core"),
            Row("cpu_plain_loop_224_pct", share[2], f"plain loop, every frame to {common}", "% of a core"),
            Row("cpu_tuned_loop_pct", share[3], f"tuned loop, every frame to {main}", "% of a core"),
            Row("cpu_ratio_to_plain_loop", median_ratio(ours, plain), f"ours / plain loop, {main}", at_most=0.75),
            Row("cpu_ratio_to_plain_loop_224", median_ratio(ours, plain_common), f"ours / plain loop, {common}"),
            Row("cpu_ratio_to_tuned_loop", median_ratio(ours, tuned), f"ours / tuned loop, {main}"),
        ),
        (
            "Plain: frame.to_ndarray(width, height, 'rgb24', FAST_BILINEAR), as in PyAV's documentation. Tuned: one "
            "scaler kept for all frames, no copy, as ours does. One decoder thread, audio resampled, on all sides.",
            f"Ours scales only what pack {manifest.name} samples, to every size it takes, and cuts its windows.",
            f"{seconds:g} s of media in real time, process CPU time without start-up, side by side; "
            f"median of {runs} runs.",
        ),
    )


def _text(width: int, height: int) -> str:
    return f"{width}x{height}"


def _side_by_side(clip: Clip, manifest_file: Path, sides: Sequence[str], seconds: float) -> list[float]:
    command = [sys.executable, "-m", "bench.decoding", str(clip.path), str(manifest_file), str(seconds)]
    children = [subprocess.Popen([*command, *side.split()], stdout=subprocess.PIPE, text=True) for side in sides]
    try:
        return [_cpu_s_of(child, seconds) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _cpu_s_of(child: subprocess.Popen[str], seconds: float) -> float:
    said, _ = child.communicate(timeout=60 + 2 * seconds)
    if child.returncode != 0:
        raise BenchError(f"a child of the CPU benchmark failed with exit code {child.returncode}; see above")
    return float(json.loads(said)["cpu_s"])


class _Over(Exception):
    """The measured stretch of media is over."""


def _ours_in_real_time(path: Path, manifest: Manifest, seconds: float) -> None:
    """Decode, sample and cut windows in real time, until so much media has passed."""
    watches = [Watch(manifest.name, branch) for branch in manifest.branches]
    inputs = [watch.branch.video for watch in watches if watch.branch.video is not None]
    windows, clock = SourceWindows(watches, Grace(500_000_000, 500_000_000), Ledger()), SystemClock()
    end_s = time.monotonic() + seconds

    def emit(item: MediaItem) -> None:
        cut: list[ClipWindow] = windows.push(item, clock.monotonic_ns())
        del cut
        if time.monotonic() >= end_s:
            raise _Over

    our_ingest(path, inputs, audio_rate(manifest), Pace.REALTIME, emit)


def _loop_in_real_time(path: Path, size: Size, rate: int | None, scale: Scale, seconds: float) -> None:
    begin_s = time.monotonic()

    def due(media_s: float) -> None:
        if media_s >= seconds:
            raise _Over
        if (wait_s := begin_s + media_s - time.monotonic()) > 0:
            time.sleep(wait_s)

    bare_loop(path, size, rate, scale, due)


def child(path: str, manifest_file: str, seconds: str, side: str, size: str = "") -> None:
    """Run one side of ``live_cpu`` and print its CPU seconds as JSON."""
    manifest = Manifest.model_validate_json(Path(manifest_file).read_bytes())
    begin_s = time.process_time()
    try:
        if side == "ours":
            _ours_in_real_time(Path(path), manifest, float(seconds))
        else:
            width, height = map(int, size.split("x"))
            scale = plain_scale if side == "plain" else tuned_scale()
            _loop_in_real_time(Path(path), (width, height), audio_rate(manifest), scale, float(seconds))
    except _Over:
        pass
    print(json.dumps({"cpu_s": time.process_time() - begin_s}))


if __name__ == "__main__":
    child(*sys.argv[1:])
