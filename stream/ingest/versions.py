"""Versions of the media libraries."""

from __future__ import annotations

import av


def ffmpeg_version() -> str:
    """PyAV and the FFmpeg libraries in it, as text."""
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__}, FFmpeg's libavcodec {codec}"
