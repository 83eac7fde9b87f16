from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import pytest
from av.subtitles.codeccontext import SubtitleCodecContext

from stream.clock import SystemClock
from stream.types import Frame, TextItem
from tests.stream.ingest.media import Clip, Run, check_grammar, make_clip, run_source
from tests.stream.ingest.servers import HttpServer, content

SRT = """1
00:00:00,000 --> 00:00:00,900
A <i>door</i> opens

2
00:00:01,000 --> 00:00:01,500
Two lines
of text
"""
SAID = [(0.0, 0.9, "A door opens"), (1.0, 1.5, "Two lines of text")]


def captioned(path: Path, codec: str) -> Path:
    """A clip with a track of captions."""
    (words := path.with_suffix(".srt")).write_text(SRT)
    plain = make_clip(path.with_name("plain.mkv"), Clip(seconds=2))
    with av.open(str(words)) as lines, av.open(str(plain)) as source, av.open(str(path), "w") as out:
        media = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        track, decoder = out.add_stream(codec), lines.streams[0].codec_context
        encoder = track.codec_context
        assert isinstance(encoder, SubtitleCodecContext) and isinstance(decoder, SubtitleCodecContext)
        packets = [packet for packet in source.demux() if packet.dts is not None]
        for packet in packets:
            packet.stream = media[packet.stream.index]
        for packet in lines.demux():
            if not packet.size or (decoded := decoder.decode2(packet)) is None:
                continue
            encoder.subtitle_header = decoder.subtitle_header
            encoder.time_base = Fraction(1, 1000)
            caption = encoder.encode_subtitle(decoded)
            caption.stream, caption.time_base = track, packet.time_base
            caption.pts = caption.dts = packet.pts
            caption.duration = packet.duration
            packets.append(caption)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            out.mux(packet)
    return path


def heard(run: Run) -> list[tuple[float, float, str]]:
    check_grammar(run.items)
    origin_ns = min(frame.pts_ns for frame in run.of(Frame))
    return [
        (round((t.pts_ns - origin_ns) / 1e9, 1), round((t.end_ns - origin_ns) / 1e9, 1), t.text)
        for t in run.of(TextItem)
    ]


@pytest.mark.parametrize(("name", "codec"), [("c.mp4", "mov_text"), ("c.mkv", "srt"), ("v.mkv", "webvtt")])
def test_captions_of_a_file_are_texts_at_their_times(tmp_path: Path, name: str, codec: str) -> None:
    run = run_source(captioned(tmp_path / name, codec))
    assert run.error is None
    assert heard(run) == SAID
    assert len(run.of(Frame)) == 50


def test_captions_over_http(tmp_path: Path) -> None:
    server = HttpServer()
    server.answers["/c.mkv"] = partial(content, data=captioned(tmp_path / "c.mkv", "srt").read_bytes())
    run = run_source(server.url("/c.mkv"), clock=SystemClock())
    server.close()
    assert heard(run) == SAID


def test_a_clip_without_captions_has_no_texts(tmp_path: Path) -> None:
    assert run_source(make_clip(tmp_path / "c.mp4", Clip(seconds=1))).of(TextItem) == []
