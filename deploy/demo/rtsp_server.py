#!/usr/bin/env python3
"""A small real RTSP server on this machine only: plays files to whoever connects, as a camera would.

Run by the system's Python, which has GStreamer's bindings::

    apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-rtsp python3-gi \
        gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad
    /usr/bin/python3 deploy/demo/rtsp_server.py --serve /street=street.mp4 --loop

Prints ``READY <port>`` once it listens. Each client gets the file from its beginning; nothing is encoded anew.
The encoded file is kept in memory.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

try:
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstApp", "1.0")
    gi.require_version("GstRtsp", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstApp, GstRtsp, GstRtspServer  # noqa: F401
except (ImportError, ValueError) as error:
    sys.exit(f"rtsp_server: {error}; install gir1.2-gst-rtsp-server-1.0, gstreamer1.0-rtsp and python3-gi")

PAYLOADERS = {
    "video/x-h264": "h264parse config-interval=-1 ! rtph264pay aggregate-mode=zero-latency",
    "video/x-h265": "h265parse config-interval=-1 ! rtph265pay aggregate-mode=zero-latency",
    "audio/mpeg": "aacparse ! rtpmp4gpay",
    "audio/x-opus": "rtpopuspay",
    "audio/x-mulaw": "rtppcmupay",
    "audio/x-alaw": "rtppcapay",
}
"""How each codec is put into RTP packets. The parser repeats parameter sets once before each key frame; the payloader
would do it before each slice of one, and so tear it apart."""
ROLE = "viewer"


@dataclass
class Track:
    """One encoded stream of a file."""

    caps: Any
    payloader: str
    buffers: list[Any] = field(default_factory=list)
    end: int = 0
    """Running time after the last buffer, in ns."""

    def take(self, sample: Any) -> None:
        """Keep a sample, its times counted from the beginning of the presentation."""
        buffer, segment = sample.get_buffer(), sample.get_segment()
        shift = segment.base - segment.start
        # Priming that lies before the beginning is not played.
        if buffer.pts == Gst.CLOCK_TIME_NONE or buffer.pts + shift < 0:
            return
        kept = buffer.copy_deep()
        kept.pts = buffer.pts + shift
        if buffer.dts != Gst.CLOCK_TIME_NONE:
            kept.dts = max(0, buffer.dts + shift)
        duration = 0 if buffer.duration == Gst.CLOCK_TIME_NONE else buffer.duration
        self.end = max(self.end, kept.pts + duration)
        self.buffers.append(kept)


def read_tracks(path: str) -> list[Track]:
    """The encoded streams of a file, first video and first audio. Exits with a message when there are none."""
    pipeline = Gst.parse_launch("filesrc name=file ! parsebin name=parse")
    pipeline.get_by_name("file").set_property("location", path)
    sinks: list[tuple[Any, Track]] = []

    def add(_: Any, pad: Any) -> None:
        caps = pad.get_current_caps() or pad.query_caps(None)
        name = caps.get_structure(0).get_name()
        known = [track.caps.get_structure(0).get_name().split("/")[0] for _, track in sinks]
        if name not in PAYLOADERS or name.split("/")[0] in known:
            return
        sink = Gst.ElementFactory.make("appsink")
        sink.set_property("sync", False)
        # The samples are taken after the end has been seen.
        sink.set_property("wait-on-eos", False)
        pipeline.add(sink)
        sink.sync_state_with_parent()
        pad.link(sink.get_static_pad("sink"))
        sinks.append((sink, Track(caps, PAYLOADERS[name])))

    pipeline.get_by_name("parse").connect("pad-added", add)
    pipeline.set_state(Gst.State.PLAYING)
    message = pipeline.get_bus().timed_pop_filtered(60 * Gst.SECOND, Gst.MessageType.EOS | Gst.MessageType.ERROR)
    if message is None or message.type == Gst.MessageType.ERROR:
        reason = "timed out" if message is None else message.parse_error()[0].message
        sys.exit(f"rtsp_server: {path}: cannot be read: {reason}")
    for sink, track in sinks:
        while (sample := sink.emit("try-pull-sample", 0)) is not None:
            track.caps = sample.get_caps()
            track.take(sample)
    pipeline.set_state(Gst.State.NULL)
    tracks = [track for _, track in sinks if track.buffers]
    if not tracks:
        sys.exit(f"rtsp_server: {path}: holds no stream that can be served (H.264, H.265, AAC, Opus, G.711)")
    return tracks


def played(track: Track, period: int | None) -> Iterator[Any]:
    """The track's buffers, over and over when there is a period (ns)."""
    offset = 0
    while True:
        for buffer in track.buffers:
            # PyGObject's copy() gives the same buffer again, whose times would add up.
            shifted = buffer.copy_deep()
            shifted.pts += offset
            if buffer.dts != Gst.CLOCK_TIME_NONE:
                shifted.dts += offset
            yield shifted
        if period is None:
            return
        offset += period


class FileFactory(GstRtspServer.RTSPMediaFactory):  # type: ignore[misc]
    """Makes one pipeline for each client (one for all when shared)."""

    def __init__(self, tracks: list[Track], loop: bool) -> None:
        super().__init__()
        self._tracks = tracks
        self._period = max(track.end for track in tracks) if loop else None

    def do_create_element(self, _url: Any) -> Any:
        """The pipeline of a client (called by the server)."""
        # appsrc keeps no more than a little ahead of what is being sent.
        chains = (
            f"appsrc name=track{i} format=time max-bytes=200000 ! {track.payloader} name=pay{i} pt={96 + i}"
            for i, track in enumerate(self._tracks)
        )
        return Gst.parse_bin_from_description(" ".join(chains), False)

    def do_configure(self, media: Any) -> None:
        """Feed the pipeline (called by the server)."""
        GstRtspServer.RTSPMediaFactory.do_configure(self, media)
        element = media.get_element()
        for i, track in enumerate(self._tracks):
            source = element.get_by_name(f"track{i}")
            source.set_property("caps", track.caps)
            source.connect("need-data", self._feed, played(track, self._period))

    @staticmethod
    def _feed(source: Any, _size: int, buffers: Iterator[Any]) -> None:
        buffer = next(buffers, None)
        source.emit("end-of-stream") if buffer is None else source.emit("push-buffer", buffer)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Serve files over RTSP on this machine.")
    parser.add_argument("--serve", action="append", required=True, metavar="/PATH=FILE", help="may be repeated")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--loop", action="store_true", help="play for ever")
    parser.add_argument("--shared", action="store_true", help="all clients see the same moment, like a camera's")
    parser.add_argument("--login", metavar="USER:PASSWORD", help="ask for this user and password")
    parser.add_argument("--only", choices=("tcp", "udp"), help="offer one transport")
    return parser.parse_args()


def protect(server: Any, factories: list[Any], login: str) -> None:
    """Let nobody in without this ``user:password``."""
    user, _, password = login.partition(":")
    auth = GstRtspServer.RTSPAuth.new()
    token = GstRtspServer.RTSPToken.new()
    token.set_string("media.factory.role", ROLE)
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    for factory in factories:
        permissions = GstRtspServer.RTSPPermissions.new()
        permissions.add_permission_for_role(ROLE, "media.factory.access", True)
        permissions.add_permission_for_role(ROLE, "media.factory.construct", True)
        factory.set_permissions(permissions)


def main() -> None:
    """Serve until told to end."""
    options = arguments()
    Gst.init(None)
    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(str(options.port))
    factories = []
    for mount in options.serve:
        path, _, file = mount.partition("=")
        factory = FileFactory(read_tracks(file), options.loop)
        factory.set_shared(options.shared)
        if options.only:
            tcp = options.only == "tcp"
            factory.set_protocols(GstRtsp.RTSPLowerTrans.TCP if tcp else GstRtsp.RTSPLowerTrans.UDP)
        server.get_mount_points().add_factory(path, factory)
        factories.append(factory)
    if options.login:
        protect(server, factories, options.login)
    if not server.attach(None):
        sys.exit(f"rtsp_server: cannot listen on port {options.port}; it may be taken, try --port 0")
    loop = GLib.MainLoop()
    for number in (signal.SIGINT, signal.SIGTERM):
        GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, number, loop.quit)
    print(f"READY {server.get_bound_port()}", flush=True)
    loop.run()


if __name__ == "__main__":
    main()
