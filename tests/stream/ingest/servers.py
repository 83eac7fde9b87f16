"""Real servers on loopback for tests of sources: HTTP in this process, senders of other protocols beside it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Handler = BaseHTTPRequestHandler
Answer = Callable[[Handler], None]
"""Answers one GET request."""

SENDER = """
import sys, time, av
file, url, form, *options = sys.argv[1:]
with av.open(file) as source, av.open(url, "w", format=form, options=dict(o.split("=", 1) for o in options)) as out:
    streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
    begin = time.monotonic()
    for packet in source.demux():
        if packet.dts is None:
            continue
        wait_s = begin + float(packet.dts * packet.time_base) - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        packet.stream = streams[packet.stream.index]
        out.mux(packet)
"""
"""Sends a file in its own time, by PyAV."""

SRT_SENDER = """
import sys, gi
gi.require_version("Gst", "1.0")
from gi.repository import GLib, Gst
Gst.init(None)
file, uri = sys.argv[1:]
line = Gst.parse_launch(f'filesrc location="{file}" ! tsparse set-timestamps=true ! srtsink uri="{uri}"')
loop = GLib.MainLoop()
bus = line.get_bus()
bus.add_signal_watch()
# What is still on its way is lost with the connection.
bus.connect("message::eos", lambda *_: GLib.timeout_add(1500, loop.quit))
bus.connect("message::error", lambda _, m: (print(m.parse_error(), file=sys.stderr), loop.quit()))
line.set_state(Gst.State.PLAYING)
loop.run()
line.set_state(Gst.State.NULL)
"""
"""Listens for SRT callers and sends a transport stream in its own time, by GStreamer."""


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port that is free now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sender(file: Path, url: str, form: str, **options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Sends a file to ``url`` by PyAV; with ``listen="1"`` to whoever connects."""
    pairs = [f"{key}={value}" for key, value in options.items()]
    with _child([sys.executable, "-c", SENDER, str(file), url, form, *pairs]) as child:
        yield child


@contextmanager
def rtmp_server(file: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Serves a file over RTMP, once, by Debian's ffmpeg."""
    command = ["ffmpeg", "-loglevel", "error", "-re", "-i", str(file), "-c", "copy", "-f", "flv", "-listen", "1", url]
    with _child(command) as child:
        yield child


@contextmanager
def srt_sender(file: Path, uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Sends a transport stream over SRT by GStreamer."""
    with _child(["/usr/bin/python3", "-c", SRT_SENDER, str(file), uri]) as child:
        yield child


def has_gstreamer_srt() -> bool:
    """Whether ``srt_sender`` can run here."""
    if shutil.which("/usr/bin/python3") is None:
        return False
    check = (
        "import gi; gi.require_version('Gst', '1.0'); from gi.repository import Gst; Gst.init(None); "
        "import sys; sys.exit(not all(map(Gst.ElementFactory.find, ('srtsink', 'tsparse'))))"
    )
    return subprocess.run(["/usr/bin/python3", "-c", check], capture_output=True, check=False).returncode == 0


@contextmanager
def _child(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


class HttpServer:
    """Answers by path; remembers what it was asked."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        """Paths and headers of the requests."""
        outer = self

        class Asked(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers.items())))
                answer = outer.answers.get(self.path.partition("?")[0], partial(status, code=404))
                try:
                    answer(self)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Asked)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str, login: str = "", host: str = "127.0.0.1") -> str:
        """Address of a path, with ``user:password`` where given."""
        return f"http://{login}{'@' if login else ''}{host}:{self.port}{path}"

    def paths(self) -> list[str]:
        """What was asked for."""
        return [path for path, _ in self.asked]

    def folder(self, folder: Path) -> None:
        """Serve the files of a folder at the root."""
        for file in folder.iterdir():
            self.answers[f"/{file.name}"] = partial(content, data=file.read_bytes())

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def status(handler: Handler, code: int, **headers: str) -> None:
    """Answer with a status and no body."""
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def redirect(handler: Handler, to: str) -> None:
    """Send elsewhere."""
    status(handler, 302, Location=to)


def content(handler: Handler, data: bytes, kind: str = "application/octet-stream") -> None:
    """Answer with a file, or the part of it that is asked for."""
    first, last = 0, len(data) - 1
    wanted = handler.headers.get("Range", "")
    if wanted.startswith("bytes="):
        begin, _, end = wanted.removeprefix("bytes=").partition("-")
        first, last = int(begin), int(end) if end else last
    handler.send_response(206 if wanted else 200)
    handler.send_header("Accept-Ranges", "bytes")
    handler.send_header("Content-Type", kind)
    part = data[first : last + 1]
    handler.send_header("Content-Length", str(len(part)))
    handler.end_headers()
    handler.wfile.write(part)


def stream(handler: Handler, data: bytes, kind: str = "video/x-flv") -> None:
    """Answer with a body of no known length, and close after it."""
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(data)
    handler.close_connection = True


def chunked(handler: Handler, data: bytes, kind: str = "video/mp2t") -> None:
    """Answer in chunks."""
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(data), 5000):
        part = data[start : start + 5000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    handler.wfile.write(b"0\r\n\r\n")


def pictures(handler: Handler, images: list[bytes], pause: Callable[[], None]) -> None:
    """Answer like a camera that sends JPEG after JPEG."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
    handler.end_headers()
    for image in images:
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n".encode()
        handler.wfile.write(head + image + b"\r\n")
        pause()
    handler.close_connection = True


def drip(handler: Handler, data: bytes, over: threading.Event, pause_s: float = 0.02) -> None:
    """Answer with one byte after the other until ``over``, then over again."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not over.is_set():
        for at in range(len(data)):
            handler.wfile.write(data[at : at + 1])
            if over.wait(pause_s):
                break
    handler.close_connection = True


class RawServer:
    """Takes each connection, reads a request, and lets ``answer`` say what it likes, on a thread of its own."""

    def __init__(self, answer: Callable[[socket.socket], None], asks: bool = True) -> None:
        """``asks``: whether clients send a request of HTTP first."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._asks = asks
        self._answer = answer
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(30)
            while self._asks and b"\r\n\r\n" not in connection.recv(65_536):
                pass
            self._answer(connection)

    def url(self, path: str = "/cam", scheme: str = "http") -> str:
        """Address of a path."""
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        """Take no more connections."""
        # Closing alone does not wake a thread that waits to accept.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def for_ever(connection: socket.socket, data: bytes, pause_s: float = 0.0) -> None:
    """Send it again and again, until the other side has had enough."""
    pause = threading.Event()
    while True:
        connection.sendall(data)
        if pause_s:
            pause.wait(pause_s)
