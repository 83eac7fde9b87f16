"""Decoded audio frames to mono float32 at the rate the packs take, with exact times."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

from stream.ingest.audio import Samples
from stream.ingest.timeline import SampleCounter, to_ns

_LOUDEST = np.float32(1.0)

Timed = tuple[int, Samples]
"""pts of the first sample in ns, samples."""


class MonoResampler:
    """Mixes down and resamples; starts anew when the source's format or its clock changes.

    Output samples are counted from the pts of the first input sample: the filter's look-ahead delays when they
    come out, not where they belong.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._resampler: AudioResampler | None = None
        self._format: tuple[str, str, int] | None = None
        self._unit = Fraction(1, sample_rate)
        """Time base of the source's samples."""
        self._source = SampleCounter(sample_rate)
        self._output = SampleCounter(sample_rate)
        self.restarts = 0
        """Times the audio clock was set again."""

    def feed(self, frame: AudioFrame) -> list[Timed]:
        """Resample a frame. Raises ``av.error.FFmpegError``."""
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        base = frame.time_base
        pts_ns = None if frame.pts is None or base is None else to_ns(frame.pts, base)
        done: list[Timed] = []
        if form != self._format or self._source.breaks(pts_ns):
            done = self.flush()
            self._start(form, pts_ns)
        self._source.take(frame.samples)
        # The filter must not re-time anything: the counters do.
        frame.pts = None
        frame.time_base = self._unit
        assert self._resampler is not None
        return done + self._collect(self._resampler.resample(frame))

    def flush(self) -> list[Timed]:
        """The samples still in the filter; the next frame starts anew."""
        resampler, self._resampler, self._format = self._resampler, None, None
        if resampler is None:
            return []
        return self._collect(resampler.resample(None))

    def _start(self, form: tuple[str, str, int], pts_ns: int | None) -> None:
        if self._source.next_ns is not None:
            self.restarts += 1
        start_ns = pts_ns if pts_ns is not None else self._source.next_ns or 0
        self._format = form
        self._unit = Fraction(1, form[2])
        # Channels are averaged: FFmpeg's own weights for float (0.7 each) overshoot.
        self._resampler = AudioResampler("flt", "mono", self._rate, options={"rematrix_maxval": "1.0"})
        self._source = SampleCounter(form[2])
        self._source.anchor(start_ns)
        self._output.anchor(start_ns)

    def _collect(self, frames: list[AudioFrame]) -> list[Timed]:
        timed = []
        for frame in frames:
            samples = np.frombuffer(memoryview(frame.planes[0]), np.float32, frame.samples)
            # Overshoot of the filter and of lossy codecs. (Two ufuncs spare the wrapper around clip.)
            bounded = np.minimum(samples, _LOUDEST)
            timed.append((self._output.take(frame.samples), np.maximum(bounded, -_LOUDEST, out=bounded)))
        return timed
