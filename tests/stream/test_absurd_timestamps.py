"""Timestamps that no 64 bits hold, as a broken muxer or a hostile server writes them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.stream.test_service import SCENE, run, settings_for


def _clip(path: Path, first_s: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 36, "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1)
        for n in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((36, 64, 3), n * 9, np.uint8), format="rgb24")
            frame.pts, frame.time_base = first_s + n, Fraction(1, 1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("first_s", [12_000_000_000, 5_000_000_000])
async def test_they_end_their_source_and_no_other(tiny_pack: Path, tmp_path: Path, first_s: int) -> None:
    clip = _clip(tmp_path / "clip.nut", first_s)
    service, collector, failed = await run(settings_for(tiny_pack, {"bad": str(clip), "good": SCENE}), tmp_path)
    (error,) = failed
    assert (error.reason, error.source_id) == ("timestamps", "bad") and "beyond reason" in str(error)
    assert ("bright", "end") in [(subject, phase) for _, subject, phase in collector.facts("good")]
    assert not collector.facts("bad")
    assert service.ledger.unbalanced() == {}
