"""The format of a recording: Matroska, and beside the media what is needed to live through it again. Sans-I/O.

Each block carries a ``Stamp`` (Matroska's BlockAdditional 1): the packet's own times in its own units and when it
arrived. A text track, off by default, carries the ``Note``s: connections, the clock, ends. Stamps and notes are
numbered together, in the order in which they happened. The tag ``SIGHTWIRE`` names session, part and source.
"""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from stream.clock import NS_PER_MS, NS_PER_S

FORMAT = 1
"""Version of all this; a reader refuses a higher one."""
TAG = "SIGHTWIRE"
NO_RECORDING = "not a recording of sightwire record, or no more than the beginning of one"
REPLAYED_SETTINGS = {"audio", "captions", "hop_s", "packs", "roi", "scaling", "skip_frames"}
"""Settings of a source that decide what its windows hold: a recording keeps them, and a replay takes them over."""
FAR_NS = 1 << 62
"""No time, and no number, is further away."""
MOST_REORDERED = 16
"""Frames that any decoder holds back."""
MAX_GAP_NS = 10 * NS_PER_S
"""A step of the timestamps forward by more than this is not shown to players."""
MAX_LAG_NS = 2 * NS_PER_S
"""Nor one back by more than this, which is more than one track lies behind the other."""

_NONE = -(1 << 63)
_STAMP = struct.Struct(">BQqqqqqBB")
_SIDE = struct.Struct(">BI")
_CORRUPT, _KEY = 1, 2


class NotARecording(ValueError):
    """What is read is not (or no longer) in this format."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a packet was when it arrived; players are shown other times."""

    number: int
    """Place among all stamps and notes of the session, from 0."""
    arrival_ns: int
    """When it arrived (monotonic clock of the recording process)."""
    pts: int | None
    """Presentation time in units of the track's ``time_base``."""
    dts: int | None
    """Decoding time likewise."""
    duration: int
    """Duration likewise; 0 when unknown."""
    report_ns: int | None = None
    """UTC of media time zero by a sender report that was handed on with it."""
    corrupt: bool = False
    """Whether FFmpeg marked it as damaged."""
    key: bool = False
    """Whether it is a key frame."""
    head: bytes = b""
    """What the muxer takes off: an ADTS header, or the length of each start code (see ``bitstream``)."""
    side: tuple[tuple[str, bytes], ...] = ()
    """Side data by PyAV's names, as far as decoders look at it."""

    def pack(self, side_names: tuple[str, ...]) -> bytes:
        """As bytes. ``side_names`` are PyAV's names of side data, in order."""
        times = [_NONE if value is None else value for value in (self.pts, self.dts, self.report_ns)]
        flags = self.corrupt * _CORRUPT | self.key * _KEY
        fields = (self.number, self.arrival_ns, times[0], times[1], self.duration, times[2], flags, len(self.head))
        return (
            _STAMP.pack(FORMAT, *fields)
            + self.head
            + b"".join(_SIDE.pack(side_names.index(name), len(data)) + data for name, data in self.side)
        )

    @classmethod
    def unpack(cls, data: bytes, side_names: tuple[str, ...]) -> Stamp:
        """From bytes. Raises ``NotARecording``."""
        if len(data) < _STAMP.size or data[0] != FORMAT:
            raise NotARecording("a packet without a stamp")
        _, number, arrival_ns, pts, dts, duration, report_ns, flags, length = _STAMP.unpack_from(data)
        rest = _STAMP.size + length
        if len(data) < rest or abs(arrival_ns) > FAR_NS:
            raise NotARecording("a stamp that is cut off")
        return cls(
            number,
            arrival_ns,
            _or_none(pts),
            _or_none(dts),
            duration,
            _or_none(report_ns),
            bool(flags & _CORRUPT),
            bool(flags & _KEY),
            data[_STAMP.size : rest],
            tuple(_side(data[rest:], side_names)),
        )


def _or_none(value: int) -> int | None:
    return None if value == _NONE else value


def _side(data: bytes, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    found = []
    while data:
        if len(data) < _SIDE.size:
            raise NotARecording("a stamp that is cut off")
        kind, length = _SIDE.unpack_from(data)
        if kind >= len(names) or len(data) < _SIDE.size + length:
            raise NotARecording("a stamp that is cut off")
        found.append((names[kind], data[_SIDE.size : _SIDE.size + length]))
        data = data[_SIDE.size + length :]
    return found


@dataclass(frozen=True, slots=True)
class Track:
    """A stream of a connection, as the source announced it."""

    kind: str
    """video or audio."""
    time_base: tuple[int, int]
    """Unit of its packets' times, in seconds, as a fraction."""
    frame_interval_ns: int = 0
    """Nominal interval between frames; 0 when not announced."""
    parameter_sets: str | None = None
    """In base64, those announced (none are an empty string) where the file's header may say something else: for video
    whose packets are cut at start codes, which Matroska keeps behind lengths, and for AAC with headers of its own."""
    reorder: int = 0
    """Frames that the decoder is to hold back at first to put them in order, as far as FFmpeg had found out."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection begins; the tracks are the file's, in order."""

    number: int
    arrival_ns: int
    wall_offset_ns: int
    """UTC less monotonic clock."""
    tracks: tuple[Track, ...]
    timed: bool = True
    """Whether packets carry times; else arrival is presentation."""
    uncertainty_ms: float = 200.0
    """Of capture time by arrival."""
    continues: bool = False
    """Repeated at the start of a part for whoever has not the one before; else it means nothing."""


@dataclass(frozen=True, slots=True)
class ClockSet:
    """From here on, UTC is the monotonic clock plus another offset."""

    number: int
    wall_offset_ns: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """The stream ended: the decoder of a track was told to give what it still held."""

    number: int
    arrival_ns: int
    track: int


@dataclass(frozen=True, slots=True)
class Said:
    """A caption came."""

    number: int
    arrival_ns: int
    begin_ns: int
    """When it is shown, on the media timeline."""
    end_ns: int
    text: str


@dataclass(frozen=True, slots=True)
class Unfit:
    """A packet too damaged for Matroska, kept as text."""

    number: int
    track: int
    stamp: str
    """Packed, in base64."""
    data: str
    """In base64."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The connection ended."""

    number: int
    arrival_ns: int
    reason: str
    """``EpochEnd.reason``."""


Note = Connected | ClockSet | Flushed | Said | Unfit | Ended
_KINDS: dict[str, type[Note]] = {
    "connected": Connected,
    "clock": ClockSet,
    "flushed": Flushed,
    "said": Said,
    "unfit": Unfit,
    "ended": Ended,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def note_to_text(note: Note) -> str:
    """One line of JSON."""
    return json.dumps({"note": _NAMES[type(note)], **asdict(note)})


def note_from_text(text: str) -> Note:
    """From one line of JSON. Raises ``NotARecording``."""
    try:
        values = json.loads(text)
        kind = _KINDS[values.pop("note")]
        if kind is Connected:
            if not isinstance(values["tracks"], list):
                raise ValueError(text)
            tracks = (Track(**{**track, "time_base": _ratio(track["time_base"])}) for track in values["tracks"])
            values["tracks"] = tuple(_checked(track) for track in tracks)
        return _checked(kind(**values))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotARecording("a note that cannot be read") from None


def _ratio(value: Any) -> tuple[int, int]:
    above, below = value
    if not all(isinstance(part, int) and 0 < part < 1 << 31 for part in (above, below)):
        raise ValueError(value)
    return above, below


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "float": (int, float),
    "str | None": (str, type(None)),
}

_T = TypeVar("_T", bound="Note | Track")


def _checked(what: _T) -> _T:
    """Raises ``ValueError`` for values that no recorder wrote."""
    for known in fields(what):
        value = getattr(what, known.name)
        if not isinstance(value, _TYPES.get(str(known.type), (object,))):
            raise ValueError(known.name)
        if isinstance(value, int) and abs(value) > FAR_NS:
            raise ValueError(known.name)
    if isinstance(what, Track):
        if what.kind not in ("video", "audio") or what.frame_interval_ns < 0 or not 0 <= what.reorder <= MOST_REORDERED:
            raise ValueError(what)
        b64decode(what.parameter_sets or "")
    return what


@dataclass(frozen=True, slots=True)
class Title:
    """What a file says it is."""

    session: str
    """Names one unbroken recording."""
    part: int
    """Number of the file within it, from 0."""
    source: str
    """Id of the source."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the source that decide what its windows hold; no address, no secret."""

    def to_text(self) -> str:
        """As the value of the tag."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_text(cls, text: str | None) -> Title:
        """From the tag's value. Raises ``NotARecording``."""
        try:
            values = json.loads(text or "")
            if values.pop("format") > FORMAT:
                raise NotARecording("made by a newer version; update sightwire")
            title = cls(**values)
            names = isinstance(title.session, str) and isinstance(title.source, str)
            numbered_right = isinstance(title.part, int) and 0 <= title.part < FAR_NS
            if not (names and numbered_right and isinstance(title.settings, dict)):
                raise ValueError(text)
        except NotARecording:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NotARecording(NO_RECORDING) from None
        return title


def part_path(path: Path, number: int) -> Path:
    """File of part ``number`` (from 1): ``cam.mkv``, ``cam.2.mkv``, …"""
    return path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def existing_parts(path: Path) -> dict[int, Path]:
    """The files that are there, by number."""
    pattern = re.compile(re.escape(path.stem) + r"(?:\.([1-9]\d*))?" + re.escape(path.suffix))
    matches = ((pattern.fullmatch(found.name), found) for found in path.parent.iterdir())
    return dict(sorted((int(match[1] or 1), found) for match, found in matches if match))


def numbered(path: Path) -> tuple[Path, int]:
    """The first part's path and the number, for the path of any part."""
    match = re.fullmatch(r"(.+)\.([1-9]\d*)", path.stem)
    return (path, 1) if match is None else (path.with_name(match[1] + path.suffix), int(match[2]))


@dataclass(slots=True)
class PlayTime:
    """Times for ordinary players: one line that only goes forward, whatever the source's timestamps do.

    No two packets of a track are decoded at once: FFmpeg holds packets back until it has seen a later time.
    """

    _offset_ns: int | None = None
    _newest_ns: int = 0
    _dts_ms: dict[int, int] = field(default_factory=dict)

    def place(self, track: int, pts_ns: int | None, dts_ns: int | None) -> tuple[int, int]:
        """Presentation and decoding time in ms for the next packet of a track."""
        last_ms = self._dts_ms.get(track, -1)
        at_ns = pts_ns if pts_ns is not None else dts_ns
        if at_ns is None:
            dts_ms = last_ms + 1
            self._dts_ms[track] = dts_ms
            return dts_ms, dts_ms
        if self._offset_ns is None or not -MAX_LAG_NS <= at_ns + self._offset_ns - self._newest_ns <= MAX_GAP_NS:
            self._offset_ns = self._newest_ns + 100 * NS_PER_MS - at_ns
        shown_ns = max(0, at_ns + self._offset_ns)
        self._newest_ns = max(self._newest_ns, shown_ns)
        pts_ms = shown_ns // NS_PER_MS
        wanted_ms = last_ms + 1 if dts_ns is None else (dts_ns + self._offset_ns) // NS_PER_MS
        dts_ms = max(last_ms + 1, min(wanted_ms, pts_ms))
        self._dts_ms[track] = dts_ms
        return max(pts_ms, dts_ms), dts_ms

    def restart(self) -> None:
        """What follows has timestamps of its own."""
        self._offset_ns = None

    @property
    def newest_ms(self) -> int:
        """The latest presentation time given."""
        return self._newest_ns // NS_PER_MS
