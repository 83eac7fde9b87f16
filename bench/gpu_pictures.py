"""What it takes to get pictures onto a device: ready ones, and decoded ones that are converted and scaled there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import torch
from av.video.frame import VideoFrame

from bench.common import Measured, Row
from bench.gpu_windows import moving_pictures
from engines.device_frames import DeviceFrames, Picture
from engines.manifest import Manifest
from engines.yuv import YuvPicture
from stream.ingest.decode import FrameRenderer
from stream.ingest.planes import yuv_picture

WIDTH, HEIGHT = 1280, 720
"""Of the decoded pictures."""
_BATCH = 16


def picture_rows(manifest: Manifest, device: str, seconds: float) -> Measured:
    """Pictures a second to the first branch's size, three ways; a third of ``seconds`` each."""
    video = next((branch.video for branch in manifest.branches if branch.video is not None), None)
    if video is None:
        return Measured((), ("The pack takes no video.",))
    size = (video.width, video.height)
    decoded = [VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p") for image in _large()]
    planes = [picture for frame in decoded if (picture := yuv_picture(frame)) is not None]
    ready = moving_pictures(*size, seed=1)
    renderer = FrameRenderer()
    scaled = _rate(lambda n: renderer.render(decoded[n % len(decoded)], *size), 1, seconds / 3)
    uploads = _uploaded(ready, size, device, seconds / 3)
    converted = _uploaded(planes, size, device, seconds / 3)
    into = f"{size[0]}x{size[1]}"
    return Measured(
        (
            Row("swscale_pictures_per_s", scaled, f"{WIDTH}x{HEIGHT} to {into} by swscale, one core", "pictures/s"),
            Row(f"{device}_uploaded_per_s", uploads, f"{into} RGB, uploaded", "pictures/s"),
            Row(
                f"{device}_converted_per_s",
                converted,
                f"{WIDTH}x{HEIGHT} YUV 4:2:0, uploaded, converted and scaled there",
                "pictures/s",
            ),
        ),
        (f"Uploads in batches of {_BATCH}, one thread.",),
    )


def _large() -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    return moving_pictures(WIDTH, HEIGHT, seed=2, count=8)


def _uploaded(pictures: Sequence[Picture], size: tuple[int, int], device: str, seconds: float) -> float:
    frames = DeviceFrames(*size, slots=2 * _BATCH, device=device)

    def once(n: int) -> None:
        batch = [("cam", _anew(pictures[(n * _BATCH + k) % len(pictures)])) for k in range(_BATCH)]
        frames.gather(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return _rate(once, _BATCH, seconds)


def _anew(picture: Picture) -> Picture:
    """The same pixels as a picture that was not seen before."""
    return YuvPicture(picture.format, picture.planes) if isinstance(picture, YuvPicture) else picture.view()


def _rate(once: Callable[[int], object], each: int, seconds: float) -> float:
    """Pictures a second of ``once(n)``, which handles ``each`` of them; the first call is not counted."""
    once(0)
    begin = time.perf_counter()
    for n in count(1):
        once(n)
        taken = time.perf_counter() - begin
        if taken >= seconds:
            return n * each / taken
    raise AssertionError("count() has no end")
