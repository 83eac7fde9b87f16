"""How each protocol but RTSP is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import av

from stream.errors import SourceError
from stream.ingest.bounds import MediaPatience
from stream.ingest.connection import FORMATS, PROBE, Connection, open_container
from stream.ingest.errors import Failure
from stream.ingest.hls import OPTIONS as HLS_OPTIONS
from stream.ingest.hls import HlsRequests
from stream.ingest.hls_playlist import MARK
from stream.ingest.http_input import HttpInput
from stream.ingest.link import Link, Patience
from stream.ingest.relay import Relay, address_of
from stream.ingest.srt_input import SrtInput
from stream.ingest.stats import DecodeStats
from stream.ingest.udp_input import UdpInput
from stream.ingest.video import size_options

RTMP_PORTS = {"rtmp": 1935, "rtmps": 443}
SEGMENT_UNCERTAINTY_MS = 15_000.0
"""A playlist is some segments behind the camera, and does not say by how much."""
NO_DASH = "MPEG-DASH (.mpd) is not read; give the stream's HLS address (.m3u8), or RTSP"
NOTHING = {"protocol_whitelist": "none"}
"""FFmpeg opens nothing by itself."""


def open_rtmp(link: Link, stats: DecodeStats) -> Connection:
    """RTMP through a relay, which ends FFmpeg's reads when the source must end: they cannot be taken up again."""
    patience = Patience(link)
    address = address_of(link, RTMP_PORTS[link.settings.scheme])
    relay = Relay(link, address, patience, tls=address.scheme == "rtmps", redirects=False)
    path = address.path.split("?")[0].strip("/").split("/")
    app = "/".join(path[:-1]) or path[0]
    options = {
        "protocol_whitelist": "rtmp,tcp",
        "rtmp_live": "live",
        # What the server is told it was asked for: its own name, not the relay's.
        "rtmp_tcurl": f"{address.scheme}://{address.authority}/{app}",
    }
    with contextlib.ExitStack() as undo:
        undo.callback(relay.close)
        url = address.url("rtmp", relay.authority)
        container = open_container(link, patience, url, options=options, form="live_flv")
        undo.pop_all()
    relay.opened()
    return Connection(container, relay.close, patience)


def open_http(link: Link, stats: DecodeStats) -> Connection:
    """What HTTP serves: a stream (FLV, MPEG-TS, MJPEG, …), a playlist (HLS) or a file."""
    patience = MediaPatience(link, stats)
    if urlsplit(link.url).path.lower().endswith(".mpd"):
        raise link.failure(Failure.NO_PROTOCOL, NO_DASH)
    resource = HttpInput(link, link.url, patience)
    with contextlib.ExitStack() as undo:
        undo.callback(resource.close)
        if resource.content_type == "application/dash+xml":
            raise link.failure(Failure.NO_PROTOCOL, NO_DASH)
        if resource.peek(len(MARK)) == MARK:
            undo.pop_all()
            return _open_hls(link, resource, patience, stats)
        pictures = resource.content_type == "multipart/x-mixed-replace"
        container = open_container(link, patience, resource, options=NOTHING, form="mpjpeg" if pictures else None)
        undo.pop_all()
    return Connection(container, resource.close, patience, paced=resource.finite, timed=not pictures)


def _open_hls(link: Link, playlist: HttpInput, patience: MediaPatience, stats: DecodeStats) -> Connection:
    requests = HlsRequests(link, playlist, patience, stats)
    with contextlib.ExitStack() as undo:
        undo.callback(requests.close)
        container = open_container(
            link, patience, playlist.url, options=NOTHING | HLS_OPTIONS, form="hls", io_open=requests
        )
        undo.pop_all()
    return Connection(container, requests.close, patience, paced=True, uncertainty_ms=SEGMENT_UNCERTAINTY_MS)


def open_udp(link: Link, stats: DecodeStats) -> Connection:
    """MPEG-TS over UDP."""
    patience = MediaPatience(link, stats)
    datagrams = UdpInput(link, patience)
    return _open_transport_stream(link, patience, datagrams)


def open_srt(link: Link, stats: DecodeStats) -> Connection:
    """MPEG-TS over SRT."""
    patience = MediaPatience(link, stats)
    messages = SrtInput(link, patience)
    return _open_transport_stream(link, patience, messages)


def _open_transport_stream(link: Link, patience: Patience, messages: UdpInput | SrtInput) -> Connection:
    with contextlib.ExitStack() as undo:
        undo.callback(messages.close)
        container = open_container(link, patience, messages, options=NOTHING, form="mpegts")
        undo.pop_all()
    return Connection(container, messages.close, patience)


def open_device(link: Link, stats: DecodeStats) -> Connection:
    """A camera of this machine: ``v4l2:///dev/video0?size=1280x720&fps=30&format=mjpeg``."""
    parts = urlsplit(link.url)
    given = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    names = {"size": "video_size", "fps": "framerate", "format": "input_format"}
    if unknown := sorted(given.keys() - names.keys()):
        raise link.failure(Failure.BAD_URL, f"unknown option {unknown[0]}; there are size, fps and format")
    if parts.netloc or not parts.path.startswith("/dev/"):
        raise link.failure(Failure.BAD_URL, "expected v4l2:///dev/videoN")
    if "video4linux2,v4l2" not in av.formats_available:
        raise link.failure(Failure.NO_PROTOCOL, "the installed PyAV has no V4L2; it has it on Linux")
    options = {names[key]: value for key, value in given.items()}
    options |= {"format_whitelist": FORMATS, "protocol_whitelist": "file", "fpsprobesize": PROBE["fpsprobesize"]}
    settings = link.settings
    options |= size_options(settings.max_pixels)
    container = av.open(
        parts.path, format="v4l2", options=options, timeout=(settings.open_timeout_s, settings.read_timeout_s)
    )
    return Connection(container, close=lambda: None)


OPENERS: dict[str, Callable[[Link, DecodeStats], Connection]] = {
    "rtmp": open_rtmp,
    "rtmps": open_rtmp,
    "http": open_http,
    "https": open_http,
    "udp": open_udp,
    "srt": open_srt,
    "v4l2": open_device,
}
"""By scheme. Each raises ``SourceError`` or ``av.error.FFmpegError``."""


def open_by(link: Link, stats: DecodeStats) -> Connection:
    """Open the source's address by its scheme."""
    opener = OPENERS.get(link.settings.scheme)
    if opener is None:
        raise SourceError(link.settings.id, Failure.BAD_URL.value, "no such protocol", retryable=False)
    return opener(link, stats)
