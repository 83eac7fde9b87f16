"""Recordings as files: cut off, full, in parts, played by others, kept to their owner."""

from __future__ import annotations

import logging
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.clock import ManualClock, SystemClock
from stream.errors import SettingsError
from stream.ingest import recorder as recorder_module
from stream.ingest.errors import Failure
from stream.ingest.matroska import SIDE_NAMES
from stream.ingest.recorder import RETRY_NS, Recorder
from stream.ingest.recording import (
    ClockSet,
    Connected,
    Ended,
    Flushed,
    NotARecording,
    Note,
    PlayTime,
    Said,
    Stamp,
    Title,
    Track,
    Unfit,
    existing_parts,
    note_from_text,
    note_to_text,
    numbered,
    part_path,
)
from stream.ingest.recording_files import RecordingFiles
from stream.ingest.replay import replayed_source
from stream.settings import load_settings
from stream.types import EpochEnd, EpochStart
from tests.e2e.command import free_port
from tests.stream.camera import Camera, facts, recording
from tests.stream.ingest.media import EVERY_FRAME, Clip, make_clip, run_source
from tests.stream.test_sources import serving

CLIP = Clip(seconds=4, size=(320, 240), gop=12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", CLIP)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(5_000_000_000_000)


def record(path: Path, clock: ManualClock, clip: Path, times: int = 1, max_bytes: int = 1 << 30) -> Camera:
    with recording(path, clock, max_bytes) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        for _ in range(times):
            camera.play(clip)
    return camera


def replayed(path: Path) -> list[tuple[object, ...]]:
    run = run_source(f"replay://{path}", clock=SystemClock())
    assert run.error is None, run.error
    return facts(run.items)


def test_what_is_left_of_a_file_that_was_cut_off_is_replayed(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    camera = record(tmp_path / "out.mkv", clock, clip)
    whole, live = (tmp_path / "out.mkv").read_bytes(), facts(camera.items)
    lengths = []
    for share in (0.3, 0.62, 0.9):
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(whole[: int(len(whole) * share)])
        left = replayed(cut)
        ends = [fact for fact in left if fact[0] == "end"]
        assert ends == [("end", 0, "end_of_stream")]
        # The last frame and sound are not held back for what would have followed.
        common = sum(1 for one, other in zip(left, live, strict=False) if one == other)
        assert len(left) - common <= 6
        lengths.append(common)
    assert lengths == sorted(lengths) and lengths[0] > 20
    cut.write_bytes(whole[:-20])
    assert replayed(cut) == live, "the index at the end is for players"


def test_a_damaged_file_is_replayed_as_far_as_it_goes(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    """Or refused in one line; whatever is in it, nothing else happens."""
    record(tmp_path / "out.mkv", clock, clip)
    whole = (tmp_path / "out.mkv").read_bytes()
    rng, damaged, played = random.Random(1), tmp_path / "damaged.mkv", 0
    for number in range(60):
        data = bytearray(whole)
        # In one part of the files only where the notes and the first packets are.
        end = len(data) if number % 2 else 3000
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(end)
            data[at : at + 8] = rng.choice([b"\0", b"\xff", rng.randbytes(8)]).ljust(8, rng.randbytes(1))[
                : len(data) - at
            ]
        damaged.write_bytes(data)
        run = run_source(f"replay://{damaged}", clock=SystemClock())
        played += run.error is None
        if run.error is not None:
            assert not run.error.retryable and "\n" not in str(run.error)
        assert len(run.of(EpochStart)) - len(run.of(EpochEnd)) in (0, 1)
    assert 10 < played < 60


def test_a_file_without_a_header_holds_no_media(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    record(tmp_path / "out.mkv", clock, clip)
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "out.mkv").read_bytes()[:300])
    for damaged in ("cut.mkv", "empty.mkv"):
        (tmp_path / "empty.mkv").touch()
        run = run_source(f"replay://{tmp_path / damaged}")
        assert run.error is not None and not run.error.retryable
        assert run.error.reason in (Failure.NOT_MEDIA, Failure.EMPTY)
        assert "\n" not in str(run.error)


def test_other_files_are_no_recordings(tmp_path: Path, clip: Path) -> None:
    other = make_clip(tmp_path / "other.mkv", Clip(seconds=1))
    for path, reason in ((clip, Failure.NOT_MEDIA), (other, Failure.NOT_MEDIA), (tmp_path / "no", Failure.UNREADABLE)):
        run = run_source(f"replay://{path}")
        assert run.error is not None and not run.error.retryable
        assert run.error.reason == reason
        assert str(path) in str(run.error)


def test_full_parts_make_room_and_what_is_left_is_replayed(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    """All parts together are one recording; without the first ones, it begins where they end."""
    limit = 8 * 12_000
    all_of_it = record(tmp_path / "all.mkv", clock, clip, times=8, max_bytes=8 * limit)
    assert len(existing_parts(tmp_path / "all.mkv")) > 1
    assert replayed(tmp_path / "all.mkv") == facts(all_of_it.items)
    record(tmp_path / "out.mkv", clock, clip, times=8, max_bytes=limit)
    parts = existing_parts(tmp_path / "out.mkv")
    assert min(parts) > 1 and list(parts) == list(range(min(parts), max(parts) + 1))
    assert sum(path.stat().st_size for path in parts.values()) <= limit
    left = run_source(f"replay://{parts[min(parts)]}", clock=SystemClock())
    assert left.error is None
    assert left.of(EpochStart)[0].epoch == 0
    assert len(left.of(EpochEnd)) == len(left.of(EpochStart)) >= 2
    for path in parts.values():
        with av.open(str(path)) as container:
            first = next(packet for packet in container.demux(video=0))
            assert first.is_keyframe


def test_later_sessions_leave_earlier_files_alone(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    first = record(tmp_path / "out.mkv", clock, clip)
    before = (tmp_path / "out.mkv").read_bytes()
    second = record(tmp_path / "out.mkv", clock, clip)
    assert (tmp_path / "out.mkv").read_bytes() == before
    assert replayed(tmp_path / "out.mkv") == facts(first.items)
    assert replayed(tmp_path / "out.2.mkv") == facts(second.items)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond this: the kernel refuses, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_the_recording_only_and_that_for_a_while(
    tmp_path: Path, clock: ManualClock, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out.mkv"
    recorder = Recorder("cam", path, 1 << 30, clock)
    camera = Camera(recorder, clock, EVERY_FRAME)
    with disk_of(20_000):
        camera.play(clip)
        camera.play(clip)
        wait_until(lambda: recorder.has_failed)
    assert camera.stats.frames_decoded == 2 * 4 * 25, "the analysis goes on"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.startswith(f"source cam: recording stopped: {path}: ") and "\n" not in line
    camera.play(clip)
    assert existing_parts(path).keys() == {1}, "not tried again at once"
    clock.advance(RETRY_NS)
    epochs = camera.epoch
    before = len(camera.items)
    camera.play(clip)
    recorder.close()
    assert recorder.join(20)
    # A session of its own, from its first key frame on.
    again = run_source(f"replay://{tmp_path / 'out.2.mkv'}", clock=SystemClock())
    assert again.error is None
    assert [fact[3:] for fact in facts(again.items) if fact[0] == "frame"] == [
        fact[3:] for fact in facts(camera.items[before:]) if fact[0] == "frame"
    ]
    assert epochs == 3


def test_a_slow_disk_does_not_hold_up_the_source(
    tmp_path: Path, clock: ManualClock, clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    write = RecordingFiles.write

    def slow(self: RecordingFiles, *args: object) -> None:
        assert goes_on.wait(30)
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RecordingFiles, "write", slow)
    monkeypatch.setattr(recorder_module, "QUEUE_BYTES", 5_000)
    recorder = Recorder("cam", tmp_path / "out.mkv", 1 << 30, clock)
    camera = Camera(recorder, clock, EVERY_FRAME)
    camera.play(clip)
    assert camera.stats.frames_decoded == 4 * 25
    assert [record.levelname for record in caplog.records if "disk is too slow" in record.getMessage()] == ["ERROR"]
    assert recorder.has_failed
    goes_on.set()
    recorder.close()
    assert recorder.join(20)
    live = facts(camera.items)
    left = replayed(tmp_path / "out.mkv")
    assert 3 < len(left) < len(live)
    assert left[0] == live[0]


def wait_until(so: object, seconds: float = 20) -> None:
    waited = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if so():  # type: ignore[operator]
            return
        waited.wait(0.01)
    raise AssertionError("it never was so")


def test_ordinary_players_see_one_line_of_time(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    with recording(tmp_path / "out.mkv", clock) as recorder:
        camera = Camera(recorder, clock, EVERY_FRAME)
        camera.play(clip)
        # Another connection begins at zero again, and jumps in its midst.
        camera.play(clip, shift_s=lambda at_s: 0.0 if at_s < 2 else 7200.0)
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.duration is not None and 7.5 < container.duration / 1e6 < 10
        times = [frame.time for frame in container.decode(video=0)]
        assert len(times) == 2 * 4 * 25
        assert times == sorted(times) and times[-1] < 10
        text = container.streams.subtitles[0]
        assert not text.disposition, "the notes are not shown unless asked for"
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 2 * 4 * 48_000


def test_only_its_owner_reads_a_recording(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    record(tmp_path / "out.mkv", clock, clip)
    assert (tmp_path / "out.mkv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("path", "cause"), [
    ("nowhere/out.mkv", "no folder"),
    ("out.2.mkv", "must not end in a number"),
])  # fmt: skip
def test_paths_that_cannot_be_recorded_to(tmp_path: Path, clock: ManualClock, path: str, cause: str) -> None:
    with pytest.raises(SettingsError, match=cause):
        Recorder("cam", tmp_path / path, 1 << 30, clock)


@pytest.mark.parametrize(("source", "cause"), [
    ({"url": "clip.mp4"}, "a file source is not recorded"),
    ({"url": "synthetic://a"}, "a synthetic source is not recorded"),
    ({"url": "rtsp://cam/1", "privacy": [[[0, 0], [1, 0], [1, 1]]]}, "without the privacy masks"),
    ({"url": "rtsp://cam/1", "trusted": False}, "only the configuration"),
    ({"url": "replay://out.mkv", "record": None, "loop": True}, "lived through once"),
    ({"url": "rtsp://cam/1", "record_max_mb": 1}, "greater than or equal to 8"),
])  # fmt: skip
def test_sources_that_are_not_recorded(source: dict[str, object], cause: str) -> None:
    with pytest.raises(SettingsError, match=cause):
        load_settings(None, {"sources": [{"id": "cam", "record": "out.mkv", **source}]})


def test_two_sources_are_not_recorded_to_one_file() -> None:
    sources = [{"id": name, "url": "rtsp://cam/1", "record": "out.mkv"} for name in "ab"]
    with pytest.raises(SettingsError, match=r"two sources are recorded to out\.mkv"):
        load_settings(None, {"sources": sources})


def test_a_replay_takes_over_what_decides_windows(tmp_path: Path, clock: ManualClock, clip: Path) -> None:
    recorder = Recorder("cam", tmp_path / "out.mkv", 1 << 30, clock, {"hop_s": 0.5, "audio": False, "url": "rtsp://x"})
    Camera(recorder, clock, EVERY_FRAME).play(clip)
    recorder.close()
    assert recorder.join(20)
    source = replayed_source(tmp_path / "out.mkv")
    assert source == {"id": "cam", "url": f"replay://{tmp_path / 'out.mkv'}", "hop_s": 0.5, "audio": False}


times = st.integers(-(1 << 62), (1 << 62) - 1)
side = st.lists(st.tuples(st.sampled_from(SIDE_NAMES), st.binary(max_size=40)), max_size=3)
stamps = st.builds(
    Stamp,
    number=st.integers(0, (1 << 63) - 1),
    arrival_ns=times,
    pts=st.none() | times,
    dts=st.none() | times,
    duration=times,
    report_ns=st.none() | times,
    corrupt=st.booleans(),
    key=st.booleans(),
    head=st.binary(max_size=9),
    side=side.map(tuple),
)
numbers = st.integers(0, 1 << 62)
tracks = st.builds(Track, st.sampled_from(["video", "audio"]), st.tuples(*[st.integers(1, (1 << 31) - 1)] * 2), numbers)
notes = st.one_of(
    st.builds(Connected, numbers, times, times, st.lists(tracks, max_size=3).map(tuple)),
    st.builds(ClockSet, numbers, times),
    st.builds(Flushed, numbers, times, st.integers(0, 9)),
    st.builds(Unfit, numbers, st.integers(0, 9), st.text(max_size=9), st.text(max_size=9)),
    st.builds(Said, numbers, times, times, times, st.text(max_size=20)),
    st.builds(Ended, numbers, times, st.text(max_size=20)),
)


@given(stamp=stamps)
def test_stamps_come_back(stamp: Stamp) -> None:
    assert Stamp.unpack(stamp.pack(SIDE_NAMES), SIDE_NAMES) == stamp


@settings(max_examples=50)
@given(note=notes)
def test_notes_come_back(note: Note) -> None:
    assert note_from_text(note_to_text(note)) == note


@given(data=st.binary(max_size=120))
def test_damaged_stamps_are_refused(data: bytes) -> None:
    try:
        Stamp.unpack(data, SIDE_NAMES)
    except NotARecording:
        return


@given(text=st.text(max_size=80) | st.recursive(st.none() | st.integers(), st.lists).map(str))
def test_damaged_notes_and_titles_are_refused(text: str) -> None:
    for read in (note_from_text, Title.from_text):
        with pytest.raises(NotARecording):
            read(text)


packets = st.tuples(
    st.integers(0, 1), st.none() | times.map(lambda t: t >> 12), st.none() | times.map(lambda t: t >> 12)
)


@given(given_times=st.lists(packets, max_size=40))
def test_players_are_given_times_that_muxers_take(given_times: list[tuple[int, int | None, int | None]]) -> None:
    play, last = PlayTime(), {0: -1, 1: -1}
    for track, pts_ns, dts_ns in given_times:
        pts_ms, dts_ms = play.place(track, pts_ns, dts_ns)
        assert 0 <= dts_ms <= pts_ms < 1 << 40
        assert dts_ms > last[track], "FFmpeg holds back what is no earlier than the rest"
        last[track] = dts_ms


def test_part_names() -> None:
    base = Path("rec/cam.mkv")
    assert [part_path(base, n).name for n in (1, 2, 10)] == ["cam.mkv", "cam.2.mkv", "cam.10.mkv"]
    assert numbered(Path("rec/cam.10.mkv")) == (base, 10) and numbered(base) == (base, 1)
    assert Fraction(*Track("video", (1, 90_000)).time_base) == Fraction(1, 90_000)


async def test_clients_of_the_api_name_no_files_to_write(tiny_pack: Path, tmp_path: Path) -> None:
    given = {"id": "cam", "url": f"rtsp://127.0.0.1:{free_port()}/cam"}
    wanted = {"record": str(tmp_path / "evil.mkv")}
    async with serving(tiny_pack, tmp_path, sources=[given]) as run:
        told = [await run.client.patch("/v1/sources/cam", json=wanted)]
        told.append(await run.client.post("/v1/sources", json={**given, "id": "b", **wanted}))
        assert [answer.status_code for answer in told] == [422, 422]
        assert all("only the configuration file may name a file" in answer.json()["detail"] for answer in told)
        assert run.service.sources["cam"].settings.record is None
