"""One source for each kind of address."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from engines.manifest import VideoInput
from stream.clock import Clock
from stream.ingest.address import AddressGuard
from stream.ingest.file import FileSource
from stream.ingest.network import NetworkSource
from stream.ingest.recorder import Recorder
from stream.ingest.recording import REPLAYED_SETTINGS
from stream.ingest.replay import ReplaySource
from stream.ingest.rtsp import TransportMemory
from stream.ingest.stats import DecodeStats
from stream.ingest.synthetic import SyntheticSource
from stream.ingest.tap import Tap
from stream.ingest.webrtc import WebRtcSource
from stream.ingest.webrtc_hub import Publications
from stream.regions import Blackout
from stream.source_settings import SourceSettings
from stream.types import Emit, Frame, MediaItem, Source, StopFlag


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
    tap: Tap | None = None,
    guard: AddressGuard | None = None,
    publications: Publications | None = None,
    transports: TransportMemory | None = None,
) -> CountingSource:
    """The source of these settings; nothing is connected before ``run``.

    ``inputs`` are the video inputs of every branch that watches it (none: video is not decoded), ``audio_rate``
    the rate that audio is resampled to (``None``: audio is not decoded), ``first_epoch`` the number of its first
    epoch (a reconnection goes on counting). ``tap`` looks on at the packets of a network source.
    ``guard`` says what sources may connect to that are not trusted; the default one when not given.
    ``publications`` are where publishers come to, for a source that is published to. ``transports`` remembers, from
    one connection to the next, over what RTP came. Raises
    ``SourceError`` when the address cannot be understood.
    """
    source: CountingSource
    if settings.scheme == "webrtc":
        source = WebRtcSource(settings, inputs, audio_rate, clock, first_epoch, publications)
    else:
        source = _open(settings, inputs, audio_rate, clock, first_epoch, tap, guard, transports)
    blackout = Blackout(settings.privacy, settings.roi)
    return Blackened(source, blackout) if blackout else source


def open_recorder(settings: SourceSettings, clock: Clock) -> Recorder | None:
    """What records the source, if its settings say so. Raises ``SettingsError``."""
    if settings.record is None:
        return None
    kept = settings.model_dump(mode="json", include=REPLAYED_SETTINGS, exclude_defaults=True)
    return Recorder(settings.id, settings.record, settings.record_max_mb << 20, clock, kept)


def _open(
    settings: SourceSettings,
    inputs: tuple[VideoInput, ...],
    audio_rate: int | None,
    clock: Clock,
    first_epoch: int,
    tap: Tap | None,
    guard: AddressGuard | None,
    transports: TransportMemory | None,
) -> CountingSource:
    match settings.scheme:
        case "file":
            return FileSource(settings, inputs, audio_rate, clock, first_epoch)
        case "synthetic":
            return SyntheticSource(settings, inputs, audio_rate, clock, first_epoch)
        case "replay":
            return ReplaySource(settings, inputs, audio_rate, clock, first_epoch)
        case _:
            return NetworkSource(settings, inputs, audio_rate, clock, first_epoch, tap, guard, transports)


class Blackened:
    """A source whose pictures are blackened in part, on its own thread, before anything else can see them."""

    def __init__(self, source: CountingSource, blackout: Blackout) -> None:
        self._source = source
        self._blackout = blackout
        self.stats = source.stats

    @property
    def source_id(self) -> str:
        """See ``stream.types.Source``."""
        return self._source.source_id

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """See ``stream.types.Source``."""

        def blackened(item: MediaItem) -> None:
            emit(self._blacken(item) if isinstance(item, Frame) else item)

        self._source.run(blackened, stop)

    def _blacken(self, frame: Frame) -> Frame:
        image = frame.image if frame.image.flags.writeable else frame.image.copy()
        self._blackout.apply(image, self.stats.picture_size)
        return frame if image is frame.image else replace(frame, image=image)
