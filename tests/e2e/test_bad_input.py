"""What a user meets when something is wrong: one clear line with the cause, no password, a fitting exit code."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.command import Done, Running, free_port, sightwire
from tests.e2e.conftest import StartRtspServer
from tests.stream.ingest.media import Clip, make_clip

CANARY = "canary-9f3e"
Watch = Callable[..., Done]


@pytest.fixture
def watch(tiny_pack: Path, tmp_path: Path) -> Watch:
    """``sightwire watch`` with the tiny pack."""

    def run(source: str, *more: str) -> Done:
        done = sightwire(
            tmp_path / "home", "watch", source, "--pack", str(tiny_pack), "--backend", "onnxruntime", *more
        )
        assert CANARY not in done.out + done.err, "a password was shown"
        return done

    return run


def fails(done: Done, *expected: str) -> None:
    """Exit code 1 and one line that holds all of these."""
    assert done.code == 1, done.err
    (line,) = done.errors
    for text in expected:
        assert text in line, line


@pytest.fixture
def mute_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_no_such_host(watch: Watch) -> None:
    fails(watch(f"cam=rtsp://user:{CANARY}@camera.invalid/x"), "source cam: ", "camera.invalid", "no such host")


def test_refused_port(watch: Watch) -> None:
    port = free_port()
    fails(watch(f"cam=rtsp://127.0.0.1:{port}/x"), "source cam: ", f"127.0.0.1:{port}", "connection refused")


def test_mute_port(tiny_pack: Path, tmp_path: Path, mute_port: int) -> None:
    config = tmp_path / "sightwire.yaml"
    config.write_text(
        f"sources:\n  - {{id: cam, url: 'rtsp://127.0.0.1:{mute_port}/x', open_timeout_s: 1.5}}\n"
        f"packs:\n  - {{name: '{tiny_pack}', backend: onnxruntime}}\nretry: {{give_up: true}}\n"
    )
    fails(
        sightwire(tmp_path / "home", "run", "-c", str(config), "--http-port", "0"), "source cam: ", "no answer in time"
    )


def test_wrong_credentials(watch: Watch, rtsp_server: StartRtspServer, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=2))
    url = rtsp_server(clip, "--login", "user:right").url.replace("rtsp://", f"rtsp://user:{CANARY}@")
    fails(watch(f"cam={url}"), "source cam: ", "wrong user or password")


def test_not_a_video(watch: Watch, tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("this is no video\n" * 200)
    fails(watch(f"cam={path}"), "source cam: ", "not a video or audio file")


def test_zero_length(watch: Watch, tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    fails(watch(f"cam={path}"), "source cam: ", "holds no media")


def test_a_file_that_is_not_there(watch: Watch, tmp_path: Path) -> None:
    fails(watch(f"cam={tmp_path / 'none.mp4'}"), "source cam: ", "none.mp4", "No such file")


@pytest.mark.parametrize("without", ["video", "audio"])
def test_a_stream_with_one_track_is_fine(watch: Watch, tmp_path: Path, without: str) -> None:
    clip = Clip(seconds=4, beep_s=1.0, **{without: None})  # type: ignore[arg-type]
    path = make_clip(tmp_path / "clip.mp4", clip)
    done = watch(f"cam={path}", "--fast")
    assert done.code == 0 and not done.errors
    # 4 s: five windows of 2 s, and four of 1 s where there are pictures.
    assert _row(done.err, "windows") == ("9" if without == "audio" else "5")


def _row(table: str, name: str) -> str:
    """A value of the summary."""
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        if cells[0] == name:
            return cells[1]
    raise AssertionError(f"no row {name} in {table}")


def test_a_corrupt_middle_costs_the_middle_only(watch: Watch, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "clip.mkv", Clip(seconds=12, audio=None, gop=12, size=(320, 240)))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 20] = b"\x55" * (len(data) // 20)
    path.write_bytes(bytes(data))
    done = watch(f"cam={path}", "--fast")
    assert done.code == 0, done.err
    assert int(_row(done.err, "windows")) >= 20, "21 + 12 windows when nothing is damaged"


def test_an_unknown_key(tmp_path: Path) -> None:
    config = tmp_path / "sightwire.yaml"
    config.write_text("sources:\n  - id: cam\n    url: a.mp4\nengine:\n  thraeds: 2\n")
    fails(sightwire(tmp_path, "run", "-c", str(config)), f"{config}:5: engine.thraeds: unknown key")


def test_an_unknown_pack(tmp_path: Path) -> None:
    fails(sightwire(tmp_path, "run", "-s", "synthetic://a", "--pack", "nope"), "no pack 'nope'", "sightwire export")


def test_no_source(tmp_path: Path) -> None:
    fails(sightwire(tmp_path, "run"), "no source: give --source")


def test_a_taken_metrics_port(tmp_path: Path, tiny_pack: Path, mute_port: int) -> None:
    done = sightwire(
        tmp_path, "run", "-s", "synthetic://a", "--pack", str(tiny_pack), "--backend", "onnxruntime",
        "--http-port", str(mute_port),
    )  # fmt: skip
    fails(done, f"http: cannot listen on 127.0.0.1:{mute_port}", "set http.port")


def test_an_unknown_scheme_and_a_password(tmp_path: Path) -> None:
    done = sightwire(tmp_path, "run", "-s", f"gopher://u:{CANARY}@h/x")
    fails(done, "scheme 'gopher' is not supported")
    assert CANARY not in done.err


def test_events_without_a_redis(tmp_path: Path) -> None:
    fails(sightwire(tmp_path, "events"), "no Redis: give --redis")
    fails(
        sightwire(tmp_path, "events", "--redis", f"redis://:{CANARY}@127.0.0.1:1"), "127.0.0.1:1", "cannot be reached"
    )


def test_a_camera_that_is_away_is_tried_again(tiny_pack: Path, tmp_path: Path, rtsp_server: StartRtspServer) -> None:
    """``run`` keeps trying, says so once for each cause, and takes the camera when it comes."""
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=3))
    port = free_port()
    url = f"rtsp://user:{CANARY}@127.0.0.1:{port}/cam"
    running = Running(
        tmp_path / "home", "run", "-s", f"cam={url}", "--pack", str(tiny_pack), "--backend", "onnxruntime",
        "--http-port", "0",
    )  # fmt: skip
    try:
        running.wait_for(lambda err: err.count("will try again") >= 1)
        rtsp_server(clip, "--port", str(port), "--loop")
        running.wait_for(lambda err: "source cam: live" in err)
        done = running.end()
    finally:
        running.kill()
    assert done.code == 0
    assert "connection refused" in done.err and CANARY not in done.out + done.err
