"""A real browser that publishes its (fake) camera and microphone."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode, urlsplit

PAGE = Path(__file__).with_name("publisher.html")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--mute-audio",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--allow-loopback-in-peer-connection",
]


def find_browser() -> str | None:
    """Chromium or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Publisher:
    """Serves the page that publishes, and hears what it says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.changed = threading.Condition()
        self.end = threading.Event()
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                known = {"/": PAGE.read_bytes(), "/end": b"yes" if publisher.end.is_set() else b"no"}
                body = known.get(path)
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                with publisher.changed:
                    publisher.said.append(text)
                    publisher.changed.notify_all()
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def wait_for(self, what: str, timeout_s: float = 180) -> None:
        """Until the page has said it; its errors end the wait."""
        with self.changed:
            heard = self.changed.wait_for(lambda: any(s.startswith((what, "error")) for s in self.said), timeout_s)
        assert heard and what in self.said, self.said


@contextmanager
def publishing(browser: str, home: Path, whip: str, **options: str) -> Iterator[Publisher]:
    """The browser shows the page while the block runs."""
    publisher = Publisher()
    serving = threading.Thread(target=publisher.server.serve_forever, name="page")
    serving.start()
    page = f"http://127.0.0.1:{publisher.server.server_port}/?{urlencode({'whip': whip, **options})}"
    log = (home / "browser.log").open("wb")
    process = subprocess.Popen(
        [browser, *FLAGS, f"--user-data-dir={home / 'profile'}", page], stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield publisher
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        publisher.server.shutdown()
        serving.join(10)
        publisher.server.server_close()
        log.close()
