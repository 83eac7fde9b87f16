"""Counts of one source's decoding, written by its thread and read by the metrics thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class DecodeStats:
    """Plain integers since the source was made.

    After a run ``frames_decoded = frames_sampled + frames_skipped + frames_late``.
    """

    packets: int = 0
    """Packets read."""
    corrupt_packets: int = 0
    """Packets that could not be read or decoded."""
    packets_skipped: int = 0
    """Packets of video left undecoded, since no pack needs their frames."""
    frames_decoded: int = 0
    """Frames that came out of the decoder."""
    frames_sampled: int = 0
    """Frames that some pack samples; each is emitted once per size wanted."""
    frames_emitted: int = 0
    """``Frame`` items emitted."""
    frames_skipped: int = 0
    """Frames that nobody samples: decoded, never converted."""
    frames_late: int = 0
    """Frames not newer than one before them, or (at the start of a live stream) without a time."""
    audio_samples: int = 0
    """Audio samples emitted."""
    audio_samples_dropped: int = 0
    """Audio samples that fit no timeline, came too long before the first frame, or had no time."""
    resyncs: int = 0
    """Times the timeline broke (each began a new epoch) or the audio clock was set again."""
    picture_size: tuple[int, int] | None = None
    """Width and height of the pictures that come out of the decoder now."""
