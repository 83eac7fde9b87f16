"""An open input, whatever protocol it came by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import av
import av.error
from av.container import InputContainer

from stream.ingest.capture import ARRIVAL_UNCERTAINTY_MS
from stream.ingest.errors import Failure
from stream.ingest.link import Link, Patience
from stream.ingest.video import size_options

FORMATS = (
    "rtsp,mpegts,mpegtsraw,flv,live_flv,kux,hls,mpjpeg,mjpeg,jpeg_pipe,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,"
    "asf,mpeg,h264,hevc,mp3,aac,wav,webvtt,rtp_mpegts,video4linux2,v4l2"
)
"""What a network may hand to this process. Formats that refer to other addresses are not among them, but for RTSP
and HLS, whose references are watched."""
PROBE = {
    "format_whitelist": FORMATS,
    # µs of media, and bytes, to look for streams in; the frame rate is left to be seen.
    "analyzeduration": "2000000",
    "probesize": "5000000",
    "fpsprobesize": "0",
}
SPARE_S = 2.0
"""FFmpeg's own timeout comes this much after ours, which can say what it was."""


@dataclass(slots=True, eq=False)
class Connection:
    """What was opened, and how to treat it."""

    container: InputContainer
    close: Callable[[], None]
    """Ends whatever feeds the container; to be called before the container is closed."""
    patience: Patience | None = None
    """Of reads that are ours: why they ended."""
    paced: bool = False
    """Whether media comes faster than its own time, in bursts or as a whole."""
    timed: bool = True
    """Whether packets carry times."""
    uncertainty_ms: float = ARRIVAL_UNCERTAINTY_MS
    """Of capture time by arrival."""


def open_container(
    link: Link,
    patience: Patience,
    file: object,
    *,
    options: dict[str, str],
    form: str | None = None,
    io_open: Callable[..., object] | None = None,
) -> InputContainer:
    """Open what our own reads, or a relay of ours, deliver.

    Raises ``SourceError`` if those have failed, else ``av.error.FFmpegError``.
    """
    settings = link.settings
    timeouts = (settings.open_timeout_s + SPARE_S, settings.stall_timeout_s + SPARE_S)
    try:
        container = av.open(
            file,
            "r",
            options=PROBE | size_options(settings.max_pixels) | options,
            format=form,
            timeout=timeouts,
            io_open=io_open,
            # A title in another encoding is no reason not to look at the pictures.
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        if patience.error is not None:
            raise patience.error from None
        # FFmpeg calls it an invalid argument when a format is found that is not in the list.
        if isinstance(error, UnicodeDecodeError | av.error.ArgumentError):
            raise link.failure(Failure.NOT_UNDERSTOOD) from None
        raise
    if patience.error is not None:
        container.close()
        raise patience.error
    patience.now_live()
    return container
