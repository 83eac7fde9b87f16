"""Plots of a verification as SVG for an HTML page: no library, no scripts, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 1000
LEFT, RIGHT = 190, 150
"""Room for names, and for figures."""
ROW, BAR = 24, 14
_Scale = Callable[[float], float]
COLOURS = 7
"""Classes ``c0`` to ``c6`` of the style sheet; beyond that they begin anew."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar."""

    name: str
    """Before it."""
    value: float
    """Its length; a bar of 0 is not drawn."""
    figure: str
    """Behind it."""
    colour: int
    """Number of its colour."""
    whisker: float | None = None
    """How far a thin line goes beyond it."""
    bad: bool = False
    """Whether it is to stand out."""


@dataclass(frozen=True, slots=True)
class Line:
    """Values in order."""

    name: str
    """In the legend."""
    values: tuple[float, ...]
    """The n-th stands over n; 0 or less is drawn at the lower edge of the plot."""
    colour: int
    """Number of its colour."""


def log_bars(bars: Sequence[Bar], *, limit: float, title: str) -> str:
    """Bars on a logarithmic axis with a line at ``limit``."""
    positive = [bar.value for bar in bars if bar.value > 0 and math.isfinite(bar.value)]
    low = math.floor(math.log10(min([*positive, limit / 10])))
    high = math.ceil(math.log10(max([*positive, limit * 10])))

    def x(value: float) -> float:
        exponent = high if math.isinf(value) else low if value <= 0 else math.log10(value)
        return LEFT + (WIDTH - LEFT - RIGHT) * (exponent - low) / (high - low)

    ticks = [(x(10.0**power), _power(power)) for power in range(low, high + 1, max(1, (high - low) // 8))]
    return _bars(bars, x, ticks, title, limit=x(limit))


def bars_from_zero(bars: Sequence[Bar], *, title: str) -> str:
    """Bars on a linear axis."""
    longest = max((max(bar.value, bar.whisker or 0) for bar in bars), default=0) or 1.0
    step = _nice(longest / 6)
    end = step * math.ceil(longest / step)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(value, end) / end

    ticks = [(x(step * n), f"{step * n:g}") for n in range(round(end / step) + 1)]
    return _bars(bars, x, ticks, title)


def log_lines(lines: Sequence[Line], *, limit: float | None, title: str) -> str:
    """Lines over the number of a window, on a logarithmic axis, with a legend beside them."""
    values = [value for line in lines for value in line.values if value > 0 and math.isfinite(value)]
    known = [*values, *([limit] if limit else [])] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high = max(high, low + 1)
    left, right, top, height = 70, 210, 10, 200
    count = max((len(line.values) for line in lines), default=1)

    def x(n: int) -> float:
        return left + (WIDTH - left - right) * (n + 0.5) / count

    def y(value: float) -> float:
        exponent = low if value <= 0 else high if math.isinf(value) else math.log10(value)
        return top + height * (1 - (exponent - low) / (high - low))

    parts = []
    for power in range(low, high + 1, max(1, (high - low) // 6)):
        parts.append(_rule(left, y(10.0**power), WIDTH - right, y(10.0**power), "grid"))
        parts.append(_text(left - 8, y(10.0**power) + 4, _power(power), "tick end"))
    if limit:
        parts.append(_rule(left, y(limit), WIDTH - right, y(limit), "limit"))
        parts.append(_text(WIDTH - right - 4, y(limit) - 5, "bound", "limit-name end"))
    for n in range(0, count, max(1, count // 24)):
        parts.append(_text(x(n), top + height + 18, str(n + 1), "tick middle"))
    parts.append(_text(left + (WIDTH - left - right) / 2, top + height + 36, "window", "tick middle"))
    for place, line in enumerate(lines):
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(line.values))
        parts.append(f'<polyline class="c{line.colour % COLOURS}" points="{points}"/>')
        parts += [_dot(x(n), y(value), line.colour) for n, value in enumerate(line.values)]
        parts.append(_dot(WIDTH - right + 20, top + 8 + 20 * place, line.colour))
        parts.append(_text(WIDTH - right + 32, top + 12 + 20 * place, line.name, "name"))
    return _svg(max(top + height + 42, top + 20 + 20 * len(lines)), parts, title)


def _bars(
    bars: Sequence[Bar], x: _Scale, ticks: Sequence[tuple[float, str]], title: str, limit: float | None = None
) -> str:
    bottom = 8 + ROW * len(bars)
    parts = []
    for at, text in ticks:
        parts.append(_rule(at, 4, at, bottom, "grid"))
        parts.append(_text(at, bottom + 16, text, "tick middle"))
    if limit is not None:
        parts.append(_rule(limit, 4, limit, bottom + 4, "limit"))
        parts.append(_text(limit + 9, bottom + 16, "bound", "limit-name"))
    # Last, so that figures are not struck through.
    for n, bar in enumerate(bars):
        parts += _one_bar(bar, 8 + ROW * n, x)
    return _svg(bottom + 24, parts, title)


def _one_bar(bar: Bar, top: float, x: _Scale) -> Iterator[str]:
    middle = top + BAR / 2
    yield _text(LEFT - 10, middle + 4, bar.name, "name end")
    end = x(bar.value)
    if bar.value > 0:
        kind = f"c{bar.colour % COLOURS}" + (" bad" if bar.bad else "")
        yield f'<rect class="{kind}" x="{LEFT}" y="{top:.1f}" width="{max(end - LEFT, 1):.1f}" height="{BAR}" rx="2"/>'
    if bar.whisker is not None and bar.whisker > bar.value:
        end = x(bar.whisker)
        yield _rule(x(bar.value), middle, end, middle, "whisker")
        yield _rule(end, middle - 4, end, middle + 4, "whisker")
    yield _text(end + 8, middle + 4, bar.figure, "figure bad" if bar.bad else "figure")


def _nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -4 < power < 4 else f"1e{power}"


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _dot(x: float, y: float, colour: int) -> str:
    return f'<circle class="c{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    inside = "".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{inside}</svg>"
    )
