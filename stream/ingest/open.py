"""One source for each kind of address."""

from __future__ import annotations

from typing import Protocol

from engines.manifest import VideoInput
from stream.clock import Clock
from stream.ingest.file import FileSource
from stream.ingest.rtsp import RtspSource
from stream.ingest.stats import DecodeStats
from stream.ingest.synthetic import SyntheticSource
from stream.settings import SourceSettings
from stream.types import Source


class CountingSource(Source, Protocol):
    """A source that counts what it decodes."""

    stats: DecodeStats


def open_source(
    settings: SourceSettings,
    inputs: tuple[VideoInput, ...],
    audio_rate: int | None,
    clock: Clock,
    *,
    first_epoch: int = 0,
) -> CountingSource:
    """The source of these settings; nothing is connected before ``run``.

    ``inputs`` are the video inputs of every branch that watches it (none: video is not decoded), ``audio_rate``
    the rate that audio is resampled to (``None``: audio is not decoded), ``first_epoch`` the number of its first
    epoch (a reconnection goes on counting). Raises ``SourceError`` when the address cannot be understood.
    """
    match settings.scheme:
        case "file":
            return FileSource(settings, inputs, audio_rate, clock, first_epoch)
        case "synthetic":
            return SyntheticSource(settings, inputs, audio_rate, clock, first_epoch)
        case _:
            return RtspSource(settings, inputs, audio_rate, clock, first_epoch)
