"""Nothing that a lossy camera sends ends a recording; a replay meets the same losses, and refuses what nobody wrote."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stream.clock import ManualClock, SystemClock
from stream.ingest.decode import BAD_PACKETS_LIMIT
from stream.ingest.matroska import Media, in_order, read_part
from stream.ingest.recording import (
    Connected,
    Ended,
    NotARecording,
    Said,
    Title,
    Track,
    Unfit,
    existing_parts,
    note_from_text,
    note_to_text,
)
from stream.types import AudioChunk, EpochStart, Frame, MediaItem
from tests.stream.camera import Camera, facts, recording
from tests.stream.ingest.media import EVERY_FRAME, Clip, make_clip, run_source

AS_IT_COMES = {"probesize": "32", "analyzeduration": "0"}
"""Nothing is looked for beforehand, as with RTSP: a stream is known by what its description says."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(5_000_000_000_000)


def replay(path: Path) -> list[MediaItem]:
    run = run_source(f"replay://{path}", clock=SystemClock())
    assert run.error is None, run.error
    return run.items


def record(path: Path, clock: ManualClock, clip: Path, **how: object) -> Camera:
    with recording(path, clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip, **how)  # type: ignore[arg-type]
    assert not recorder.has_failed
    return camera


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What the recorder's log says from a level on."""
    return [line.getMessage() for line in caplog.records if line.name.startswith("stream.") and line.levelno >= level]


def size_in_header(path: Path) -> tuple[int, int]:
    with av.open(str(path), options={**AS_IT_COMES, "fflags": "nofillin+noparse"}) as container:
        context = container.streams.video[0].codec_context
        return context.width, context.height


@pytest.mark.parametrize("made", [
    Clip(seconds=3),
    Clip(seconds=3, video="libx265", audio="mp2"),
    # What is read of this one leaves the rate of its sound open.
    Clip(seconds=3, b_frames=2),
], ids=lambda clip: f"{clip.video}-{clip.audio}-{clip.b_frames}")  # fmt: skip
@pytest.mark.parametrize("lost_s", [0.0, 0.2], ids=["whole", "first key frame lost"])
def test_what_the_source_did_not_announce_is_found_in_its_packets(
    tmp_path: Path, clock: ManualClock, made: Clip, lost_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    clip = make_clip(tmp_path / "clip.ts", made)
    first_s = 0.0
    with av.open(str(clip), options=AS_IT_COMES) as container:
        first_s = float(next(container.demux(video=0)).pts * container.streams.video[0].time_base)
        contexts = [stream.codec_context for stream in container.streams]
    unknown = [context.width == 0 if context.type == "video" else not context.sample_rate for context in contexts]
    assert any(unknown), "the clip is to leave something open"

    def lost(kind: str, at_s: float) -> bool:
        return kind == "video" and at_s < first_s + lost_s

    camera = record(tmp_path / "out.mkv", clock, clip, lost=lost, options=AS_IT_COMES)
    live = facts(camera.items)
    assert sum(fact[0] == "frame" for fact in live) > 20
    assert facts(replay(tmp_path / "out.mkv")) == live
    assert size_in_header(tmp_path / "out.mkv") == made.size
    assert said(caplog) == []


@pytest.mark.parametrize("seconds", [2.0, 13.0], ids=["ends while waiting", "waited for long"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_camera_whose_key_frames_never_come_is_recorded(
    tmp_path: Path, clock: ManualClock, seconds: float, codec: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sound is there, and its pictures' packets: what a decoder makes of them is the same."""
    clip = make_clip(tmp_path / "clip.ts", Clip(seconds=seconds, video=codec, gop=5, size=(64, 64)))
    keys: set[float] = set()
    with av.open(str(clip), options=AS_IT_COMES) as container:
        for packet in container.demux(video=0):
            if packet.is_keyframe and packet.dts is not None:
                keys.add(float(packet.dts * packet.time_base))

    def lost(kind: str, at_s: float) -> bool:
        return kind == "video" and at_s in keys

    camera = record(tmp_path / "out.mkv", clock, clip, lost=lost, options=AS_IT_COMES)
    assert sum(isinstance(item, AudioChunk) for item in camera.items) > 5
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    assert [line for line in said(caplog) if "no packet tells what players" in line] == said(caplog) != []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.size) > 20, "players are given them too"


def test_announced_parameters_that_nobody_understands(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mkv", Clip(seconds=3))
    with av.open(str(clip)) as container:
        sets = container.streams.video[0].codec_context.extradata
    assert sets is not None
    nonsense = (b"\0\0\0\1\x67" + b"nonsense" * 20)[: len(sets)]
    whole = clip.read_bytes()
    assert whole.count(sets) == 1
    clip.write_bytes(whole.replace(sets, nonsense))
    camera = record(tmp_path / "out.mkv", clock, clip, options=AS_IT_COMES)
    assert sum(isinstance(item, AudioChunk) for item in camera.items) > 5
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    assert camera.stats.corrupt_packets > 50


@pytest.mark.parametrize(("pts", "dts", "duration"), [
    (None, None, 0),
    (1 << 61, 1 << 61, 1 << 61),
    (-(1 << 61), -(1 << 61), -1),
    (0, 0, 0),
    (90_000, 1 << 40, 1 << 62),
    (None, 7, 1),
    (7, None, 1),
])  # fmt: skip
def test_times_that_no_camera_should_send_are_recorded(
    tmp_path: Path,
    clock: ManualClock,
    pts: int | None,
    dts: int | None,
    duration: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The recorder is given them, the decoder is not: what counts is that every packet can be read again."""
    clip = make_clip(tmp_path / "clip.ts", Clip(seconds=3))
    sent = []
    with recording(tmp_path / "out.mkv", clock) as recorder:
        received = recorder.received

        def odd(packet: av.Packet, arrival_ns: int, report_ns: int | None) -> None:
            kept = (packet.pts, packet.dts, packet.duration)
            if packet.size and len(sent) % 3:
                packet.pts, packet.dts, packet.duration = pts, dts, duration
            if packet.size:
                sent.append((packet.pts, packet.dts, packet.duration or 0, bytes(packet)))
            received(packet, arrival_ns, report_ns)
            packet.pts, packet.dts, packet.duration = kept

        recorder.received = odd  # type: ignore[method-assign]
        Camera(recorder, clock, EVERY_FRAME).play(clip)
    assert not recorder.has_failed and said(caplog) == []
    entries = in_order(read_part(tmp_path / "out.mkv"))
    media = [entry.what for entry in entries if isinstance(entry.what, Media)]
    assert [(what.stamp.pts, what.stamp.dts, what.stamp.duration) for what in media] == [one[:3] for one in sent]
    with av.open(str(tmp_path / "out.mkv")) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size and packet.pts is not None]
    assert len(times) > 50 and 0 <= min(times) <= max(times) < 1 << 40


def av1(path: Path) -> Path:
    """A clip whose packets the muxer looks into."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libsvtav1", rate=25, options={"preset": "12", "svtav1-params": "lp=1"})
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for number in range(50):
            image = np.full((120, 160, 3), 5 * number, np.uint8)
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        for start in range(0, 2 * 16_000, 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 16_000, start, Fraction(1, 16_000)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


def damaging(recorder: object, share: float, how: Callable[[random.Random, memoryview], None]) -> None:
    """Have packets arrive damaged."""
    received, rng, count = recorder.received, random.Random(3), itertools.count()  # type: ignore[attr-defined]

    def damaged(packet: av.Packet, arrival_ns: int, report_ns: int | None) -> None:
        # Without the first key frame there is nothing to be seen.
        if packet.size and next(count) > 1 and rng.random() < share:
            how(rng, memoryview(packet))
        received(packet, arrival_ns, report_ns)

    recorder.received = damaged  # type: ignore[attr-defined]


def scribble(rng: random.Random, inside: memoryview) -> None:
    for _ in range(3):
        inside[rng.randrange(min(len(inside), 400))] = rng.randrange(256)


def overwrite(rng: random.Random, inside: memoryview) -> None:
    inside[:] = rng.randbytes(len(inside))


def forbid(rng: random.Random, inside: memoryview) -> None:
    """The first bit of a unit of AV1 is never set."""
    inside[:] = b"\xff" * len(inside)


@pytest.mark.parametrize("how", [scribble, overwrite])
@pytest.mark.parametrize("codec", ["av1", "libvpx-vp9"])
def test_packets_that_the_muxer_refuses_are_kept(
    tmp_path: Path,
    clock: ManualClock,
    codec: str,
    how: Callable[[random.Random, memoryview], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    clip = tmp_path / "clip.mkv"
    made = av1(clip) if codec == "av1" else make_clip(clip, Clip(seconds=3, video=codec))
    with recording(tmp_path / "out.mkv", clock) as recorder:
        damaging(recorder, 0.4, how)
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(made)
    assert not recorder.has_failed
    assert camera.stats.corrupt_packets > 5
    assert sum(isinstance(item, Frame) for item in camera.items) > 5
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    assert said(caplog) == []
    if how is overwrite:
        assert any("not as Matroska wants them" in line for line in said(caplog, logging.INFO))


def test_what_the_muxer_refuses_later_on_is_kept_too(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so when another packet is written: here it is given what is else kept from it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("stream.ingest.matroska.av1_head", lambda data: b"")
    made = av1(tmp_path / "clip.mkv")
    with recording(tmp_path / "out.mkv", clock) as recorder:
        damaging(recorder, 0.4, forbid)
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(made)
    assert not recorder.has_failed
    assert any("not as Matroska wants them" in line for line in said(caplog, logging.INFO))
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_packets_that_are_all_kept_as_text_do_not_pile_up_in_memory(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg writes text when media follows it; where none does, the next file is begun."""
    monkeypatch.setattr("stream.ingest.recording_files.HELD_BYTES", 3000)
    made = av1(tmp_path / "clip.mkv")
    with recording(tmp_path / "out.mkv", clock) as recorder:
        damaging(recorder, 1.0, forbid)
        camera = Camera(recorder, clock, EVERY_FRAME, audio_rate=None)
        camera.play(made)
    assert len(existing_parts(tmp_path / "out.mkv")) > 2
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_a_decoder_that_was_known_to_reorder_frames_does_so_from_the_first(tmp_path: Path, clock: ManualClock) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=2))
    with recording(tmp_path / "out.mkv", clock) as recorder:
        connected = recorder.connected

        def probed(streams: tuple[av.VideoStream, ...], *more: object) -> object:
            streams[0].codec_context.reorder_depth = 3
            return connected(streams, *more)  # type: ignore[arg-type]

        recorder.connected = probed  # type: ignore[assignment]
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
    order = [type(item) for item in camera.items if isinstance(item, Frame | AudioChunk | EpochStart)]
    assert order[0] is EpochStart
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)


def test_a_connection_that_was_given_up_is_given_up_again_and_the_next_one_goes_on(
    tmp_path: Path, clock: ManualClock
) -> None:
    clip = make_clip(tmp_path / "clip.mkv", Clip(seconds=14, audio=None, size=(64, 64)))
    broken = False

    def now_and_then(rng: random.Random, inside: memoryview) -> None:
        if broken:
            overwrite(rng, inside)

    with recording(tmp_path / "out.mkv", clock) as recorder:
        damaging(recorder, 1.0, now_and_then)
        camera = Camera(recorder, clock, EVERY_FRAME)
        for broken in (False, True, False):  # noqa: B007 - the packets of that connection are
            camera.play(clip)
            clock.advance(1_000_000_000)
    assert camera.stats.corrupt_packets == BAD_PACKETS_LIMIT
    assert facts(replay(tmp_path / "out.mkv")) == facts(camera.items)
    assert len([item for item in camera.items if isinstance(item, EpochStart)]) == 2


def test_notes_and_titles_of_other_kinds_than_a_recorder_writes_are_refused() -> None:
    track = Track("video", (1, 90_000), parameter_sets="AAAA")
    good = {"title": Title("a", 0, "cam").to_text()}
    for note in (Connected(0, 1, 2, (track,)), Said(0, 1, 2, 3, "text"), Unfit(0, 1, "AA", "AA"), Ended(0, 1, "lost")):
        good[note_to_text(note)] = note_to_text(note)
        assert note_from_text(note_to_text(note)) == note
    for text in good.values():
        told = json.loads(text)
        for name in told:
            for other in (None, [], {}, "text", 1.5, 1 << 70):
                if type(other) is type(told[name]) and not isinstance(other, int):
                    continue
                with pytest.raises(NotARecording):
                    (note_from_text if "note" in told else Title.from_text)(json.dumps({**told, name: other}))
    wrong = [
        ("time_base", [1, 1 << 31]),
        ("kind", "subtitle"),
        ("parameter_sets", "A"),
        ("reorder", 17),
        ("reorder", -1),
    ]
    for name, value in wrong:
        told = json.loads(note_to_text(Connected(0, 1, 2, (track,))))
        told["tracks"][0][name] = value
        with pytest.raises(NotARecording):
            note_from_text(json.dumps(told))
    with pytest.raises(NotARecording):
        note_from_text("[" * 100_000)
