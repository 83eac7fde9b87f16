"""Closed captions that travel inside pictures: EIA-608 (CTA-608-E; 47 CFR 15.119), one of its four services.

Each picture carries pairs of bytes (ATSC A/53, part 4, ``cc_data``). FFmpeg's ``cc_dec`` reads them too, but tells of a
caption when it is over, too late for the windows that it was shown in, or of every letter as it comes. Here a caption
that pops on is told of when it appears, one that is written letter by letter when its line is complete. Sans-I/O.
"""

from __future__ import annotations

from enum import Enum

from stream.clock import NS_PER_MS, NS_PER_S

PAUSE_NS = 1500 * NS_PER_MS
"""A line to which nothing was added for this long is taken for complete."""
GAP_NS = 5 * NS_PER_S
"""Pictures further apart than this have nothing to do with each other."""
LONGEST = 400
"""Characters of one caption: more than 15 rows are never full; a line that is never ended is cut there."""
_LETTER_NS = NS_PER_S // 15
_SHOWN_NS = (1500 * NS_PER_MS, 6 * NS_PER_S)
_REPEATED_NS = 150 * NS_PER_MS
_PADDING = 0

_BASIC = {
    0x27: "\u2019", 0x2A: "á", 0x5C: "é", 0x5E: "í", 0x5F: "ó", 0x60: "ú", 0x7B: "ç", 0x7C: "÷", 0x7D: "Ñ", 0x7E: "ñ",
    0x7F: "█",
}  # fmt: skip
"""Where the basic set is not ASCII."""
_SPECIAL = "®°½¿™¢£♪à èâêîôû"
_EXTENDED = {
    0x12: "ÁÉÓÚÜü\u2018¡*'—©℠•“”ÀÂÇÈÊËëÎÏïÔÙùÛ«»",
    0x13: "ÃãÍÌìÒòÕõ{}\\^_|~ÄäÖöß¥¤¦ÅåØø┌┐└┘",
}
_ROWS = (11, 11, 1, 2, 3, 4, 12, 13, 14, 15, 5, 6, 7, 8, 9, 10)
"""By the low three bits of a row code's first byte, and bit 5 of its second."""

Caption = tuple[int, int, str]
"""Begin and end in ns on the media timeline, text."""


class _Mode(Enum):
    NONE = "none"
    POP_ON = "pop-on"
    """Written out of sight, shown as a whole."""
    PAINT_ON = "paint-on"
    """Written on the screen."""
    ROLL_UP = "roll-up"
    """Written in one row, that moves up when it is complete."""


class _Rows:
    """Text in rows, in the order of the screen."""

    def __init__(self) -> None:
        self._rows: dict[int, list[str]] = {}
        self._row = 15
        self._count = 0

    def go(self, row: int) -> None:
        """Write in this row."""
        self._row = row
        self.space()

    def space(self) -> None:
        """What follows is another word."""
        if self._rows.get(self._row):
            self.put(" ")

    def put(self, letter: str) -> None:
        """Write."""
        if self._count < LONGEST:
            self._count += 1
            self._rows.setdefault(self._row, []).append(letter)

    def back(self) -> None:
        """Take the last letter away."""
        if row := self._rows.get(self._row):
            row.pop()

    def clear_row(self) -> None:
        """Empty the row."""
        self._rows.pop(self._row, None)

    @property
    def full(self) -> bool:
        """Whether nothing more is taken."""
        return self._count >= LONGEST

    def text(self) -> str:
        """All of it in one line."""
        return " ".join(" ".join("".join(self._rows[row]) for row in sorted(self._rows)).split())


class ClosedCaptions:
    """Reads the pairs of one stream's pictures, in the order of presentation."""

    def __init__(self, service: int = 1) -> None:
        """``service`` is 1 to 4: CC1 and CC2 lie in the first field, CC3 and CC4 in the second."""
        # The pair is valid, and of that field.
        self._head = 0b100 if service <= 2 else 0b101
        self._channel = 0x08 if service in (2, 4) else 0
        self.found = False
        """Whether there has been anything but padding."""
        self._last_ns: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._mode = _Mode.NONE
        self._ours = False
        self._before: tuple[int, int] | None = None
        self._before_ns = 0
        self._loading = _Rows()
        self._written = _Rows()
        self._since_ns: int | None = None
        self._touched_ns = 0

    def see(self, pts_ns: int, data: bytes) -> list[Caption]:
        """Captions that became known with the picture of this time; ``data`` is its ``cc_data``, empty without any."""
        done: list[Caption] = []
        if self._last_ns is not None and not 0 <= pts_ns - self._last_ns <= GAP_NS:
            done += self._complete(self._last_ns)
            self._reset()
        self._last_ns = pts_ns
        for at in range(0, len(data) - 2, 3):
            if data[at] & 0b111 == self._head and _odd(data[at + 1]) and _odd(data[at + 2]):
                done += self._pair(data[at + 1] & 0x7F, data[at + 2] & 0x7F, pts_ns)
        if self._since_ns is not None and (pts_ns - self._touched_ns >= PAUSE_NS or self._written.full):
            done += self._complete(pts_ns)
        return done

    def finish(self) -> list[Caption]:
        """What was begun when the stream ended."""
        done = self._complete(self._last_ns) if self._last_ns is not None else []
        self._reset()
        return done

    def _pair(self, first: int, second: int, now_ns: int) -> list[Caption]:
        if first == _PADDING and second == _PADDING:
            return []
        self.found = True
        if first >= 0x20:
            self._before = None
            for code in (first, second):
                if code >= 0x20:
                    self._letter(_BASIC.get(code, chr(code)), now_ns)
            return []
        if first < 0x10:
            # Data about the programme (XDS), which letters follow; captions go on with a control code.
            self._ours &= not first
            return []
        if self._is_repeated(first, second, now_ns):
            return []
        self._ours = first & 0x08 == self._channel
        return self._control(first & ~0x08, second, now_ns) if self._ours else []

    def _is_repeated(self, first: int, second: int, now_ns: int) -> bool:
        """Control codes are sent twice, so that one may be lost; padding may lie between."""
        if self._before == (first, second) and now_ns - self._before_ns <= _REPEATED_NS:
            self._before = None
            return True
        self._before, self._before_ns = (first, second), now_ns
        return False

    def _control(self, first: int, second: int, now_ns: int) -> list[Caption]:
        if second >= 0x40:
            self._target().go(_ROWS[(first & 7) << 1 | (second >> 5 & 1)] if self._mode is not _Mode.ROLL_UP else 15)
        elif first == 0x11 and second >= 0x30:
            self._letter(_SPECIAL[second - 0x30], now_ns)
        elif first in _EXTENDED and second >= 0x20:
            # Stands in for the letter before it, which is for receivers that do not know it.
            self._target().back()
            self._letter(_EXTENDED[first][second - 0x20], now_ns)
        elif first in (0x14, 0x15) and 0x20 <= second < 0x30:
            return self._command(second, now_ns)
        elif first in (0x11, 0x17) and second >= 0x20:
            # Italics, colours and tabs take the place of a space.
            self._target().space()
        return []

    def _command(self, code: int, now_ns: int) -> list[Caption]:
        match code:
            case 0x20:
                return self._change(_Mode.POP_ON, now_ns)
            case 0x21:
                self._target().back()
            case 0x24:
                self._target().clear_row()
            case 0x25 | 0x26 | 0x27:
                return self._change(_Mode.ROLL_UP, now_ns)
            case 0x29:
                return self._change(_Mode.PAINT_ON, now_ns)
            case 0x2A | 0x2B:
                # Text for another purpose than captions.
                return self._change(_Mode.NONE, now_ns)
            case 0x2D if self._mode is _Mode.ROLL_UP:
                return self._complete(now_ns)
            case 0x2C:
                return self._complete(now_ns)
            case 0x2E:
                self._loading = _Rows()
            case 0x2F:
                done = self._change(_Mode.POP_ON, now_ns)
                text, self._loading = self._loading.text(), _Rows()
                return [*done, (now_ns, now_ns + shown_ns(text), text)] if text else done
        return []

    def _target(self) -> _Rows:
        return self._loading if self._mode is _Mode.POP_ON else self._written

    def _letter(self, letter: str, now_ns: int) -> None:
        if self._mode is _Mode.NONE or not self._ours:
            return
        self._target().put(letter)
        if self._mode is not _Mode.POP_ON:
            self._touched_ns = now_ns
            if self._since_ns is None:
                self._since_ns = now_ns

    def _change(self, mode: _Mode, now_ns: int) -> list[Caption]:
        done = self._complete(now_ns) if mode is not self._mode else []
        self._mode = mode
        return done

    def _complete(self, now_ns: int) -> list[Caption]:
        """What was written on the screen since the last time."""
        text, since_ns = self._written.text(), self._since_ns
        self._written, self._since_ns = _Rows(), None
        return [(since_ns, max(now_ns, since_ns + 1), text)] if since_ns is not None and text else []


def shown_ns(text: str) -> int:
    """How long a caption is meant to be read that does not say when it goes: 15 letters a second, 1.5 to 6 s."""
    return min(max(len(text) * _LETTER_NS, _SHOWN_NS[0]), _SHOWN_NS[1])


def _odd(byte: int) -> bool:
    return byte.bit_count() % 2 == 1
