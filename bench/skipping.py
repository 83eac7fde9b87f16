"""What leaving frames undecoded gains where packs look at few of them, and what scaling by area costs.

Run ``python -m bench.skipping``; one core, no network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
from av.video.stream import VideoStream
from rich.console import Console

from bench.clip import FPS, bench_clip
from bench.common import Measured, Row, interleaved, machine, median_ratio, show, write_json
from engines.manifest import VideoInput
from stream.clock import SystemClock
from stream.ingest.file import FileSource
from stream.ingest.stats import DecodeStats
from stream.source_settings import SourceSettings

SECONDS = 40
SIZE = 224


def encoded(origin: Path, path: Path, *, gop: int, b_frames: int) -> Path:
    """The clip's pictures in H.264 with a key frame every ``gop`` frames."""
    with av.open(str(origin)) as source, av.open(str(path), "w") as out:
        options = {"preset": "veryfast", "g": str(gop), "bf": str(b_frames), "sc_threshold": "0", "threads": "1"}
        stream = out.add_stream("libx264", rate=FPS, options=options)
        assert isinstance(stream, VideoStream)
        first = source.streams.video[0]
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        for frame in source.decode(first):
            frame.pict_type = 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def ingest(path: Path, fps: str, **settings: object) -> DecodeStats:
    """Run a file through ingest as fast as it goes."""
    values: dict[str, object] = {"id": "bench", "url": str(path), "pace": "fast", "audio": False}
    video = VideoInput(width=SIZE, height=SIZE, fps=Fraction(fps))
    source = FileSource(SourceSettings.model_validate(values | settings), (video,), None, SystemClock())
    source.run(lambda item: None, threading.Event())
    return source.stats


def media_per_cpu_s(path: Path, fps: str, **settings: object) -> float:
    """Seconds of media for each second of CPU time."""
    begin_s = time.process_time()
    ingest(path, fps, **settings)
    return SECONDS / (time.process_time() - begin_s)


def gain(path: Path, key: str, fps: str, meaning: str, runs: int) -> list[Row]:
    """With frames left out, and without."""
    stats = ingest(path, fps)
    sides = (partial(media_per_cpu_s, path, fps), partial(media_per_cpu_s, path, fps, skip_frames=False))
    ours, whole = interleaved(runs, *sides)
    decoded = stats.frames_decoded / (SECONDS * FPS)
    return [
        Row(f"skip_{key}_realtime", statistics.median(ours), f"{meaning}: media per CPU time", "s/s"),
        Row(f"skip_{key}_share", decoded, f"{meaning}: share of frames decoded"),
        Row(f"skip_{key}_gain", median_ratio(ours, whole), f"{meaning}: against decoding all"),
    ]


def measure(runs: int) -> Measured:
    """All rows."""
    clip = bench_clip(SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        camera = encoded(clip.path, Path(folder) / "camera.mp4", gop=FPS, b_frames=0)
        film = encoded(clip.path, Path(folder) / "film.mp4", gop=10 * FPS, b_frames=2)
        ingest(camera, "1")
        rows = gain(camera, "nonkey", "1", "1 fps, key frame each second", runs)
        rows += gain(film, "nonref", "5", "5 fps, two B-frames, key frame each 10 s", runs)
        rows += gain(camera, "none", "8", "8 fps, key frame each second: nothing to leave out", runs)
        fast, area = (partial(media_per_cpu_s, camera, "25", scaling=scaling) for scaling in ("fast", "area"))
        by_fast, by_area = interleaved(runs, fast, area)
    rows.append(Row("scale_area_cost", median_ratio(by_fast, by_area), f"CPU time with area, {SIZE}x{SIZE} at 25 fps"))
    note = (
        f"{SECONDS} s of 640x360 at {FPS} fps (from {clip.origin}), to {SIZE}x{SIZE}; median of {runs} interleaved runs"
    )
    return Measured(tuple(rows), (note,))


def main() -> None:
    """Measure, print, and write JSON where told to."""
    parser = argparse.ArgumentParser(prog="python -m bench.skipping", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    measured = measure(options.runs)
    show(Console(width=120), "decoding what is needed", measured)
    if options.json is not None:
        write_json(options.json, [measured], machine())


if __name__ == "__main__":
    main()
