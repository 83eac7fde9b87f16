"""Plots of a report, as PNG files. No display is needed, and no state is kept between plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from models.metrics import Floats, Indices, Interval, Reliability
from models.scored import MaskExample

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Told apart with any colour vision (Okabe & Ito, 2008)."""
INK, FAINT = "#222222", "#999999"
DPI = 120
NUMBERED_CLASSES = 20
"""A confusion matrix of more classes shows colours only."""
NAMED_CLASSES = 60
"""… and of more than this only some names."""
_LINES = ("-", "--", ":")
_LONGEST = 22


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A label's scores where its truth is known."""

    label: str
    """Name."""
    scores: Floats
    """float ``[N]``."""
    positive: NDArray[np.bool_]
    """bool ``[N]``, some true and some false."""
    note: str
    """Shown behind the name."""


def plot_history(path: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Losses and validation measures by epoch; false, and no file, when there is nothing to show.

    A record is one epoch's numbers by name; names with ``loss`` in them go to the left, measures in 0..1 to the right.
    """
    x = [float(record.get("epoch", n + 1)) for n, record in enumerate(history)]
    names = list(dict.fromkeys(name for record in history for name in record if _is_curve(name, history)))
    losses = [name for name in names if "loss" in name]
    scores = [name for name in names if name not in losses]
    sides = [(title, part) for title, part in (("loss", losses), ("validation", scores)) if part]
    if not sides:
        return False
    figure = _figure(5.2 * len(sides), 3.8)
    for n, (title, part) in enumerate(sides, start=1):
        axes = figure.add_subplot(1, len(sides), n)
        for place, name in enumerate(part):
            y = [_number(record.get(name)) for record in history]
            mark = "o" if len(x) <= 30 else None
            axes.plot(x, y, label=_short(name, 34), markersize=3, linewidth=1.6, marker=mark, **_style(place))
        axes.set_xlabel("epoch")
        axes.set_title(title, loc="left", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    return _save(figure, path)


def _is_curve(name: str, history: Sequence[Mapping[str, Any]]) -> bool:
    values = [record.get(name) for record in history]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if not numbers or name in ("epoch", "step", "steps"):
        return False
    return "loss" in name or (all(0 <= value <= 1 for value in numbers) and "rate" not in name)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def plot_confusion(path: Path, matrix: Indices, labels: Sequence[str], *, unit: str) -> bool:
    """A confusion matrix ``[C, C]``, rows truth: colours are shares of the row, numbers counts or percentages.

    ``unit`` says what was counted; pixels are shown in per cent of their row.
    """
    size = len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(1.9 + 0.42 * size, 3.6, 11.0))
    figure = _figure(side + 1.2, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    step = 1 if size <= NAMED_CLASSES else int(np.ceil(size / NAMED_CLASSES))
    ticks = list(range(0, size, step))
    names = [_short(labels[n]) for n in ticks]
    font = 9.0 if size <= 12 else 7.5 if size <= NUMBERED_CLASSES else 5.5
    axes.set_xticks(ticks, names, rotation=90 if size > 4 else 0, fontsize=font)
    axes.set_yticks(ticks, names, fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if size <= NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            text = f"{100 * shares[row, column]:.0f}" if unit == "pixels" else str(int(matrix[row, column]))
            colour = "white" if shares[row, column] > 0.55 else INK
            if text != "0":
                axes.text(column, row, text, ha="center", va="center", fontsize=font - 0.5, color=colour)
    shown = ", per cent of each row" if unit == "pixels" else ""
    axes.set_title(f"{unit}{shown}", loc="left", fontsize=9, color=FAINT)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _save(figure, path)


def plot_reliability(path: Path, found: Reliability, *, what: str) -> bool:
    """How often answers are right against how sure they were, over a histogram of how sure they were."""
    figure = _figure(4.2, 4.6)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width, centres = np.diff(found.edges), (found.edges[1:] + found.edges[:-1]) / 2
    full = found.count > 0
    top.bar(centres[full], found.correct[full], width=width[full] * 0.92, color=COLOURS[5], label="observed")
    top.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="as sure as right")
    dots = {"color": COLOURS[1], "markersize": 4, "clip_on": False, "label": "mean of the bin"}
    top.plot(found.confidence[full], found.correct[full], "o", **dots)
    top.set_ylim(0, 1)
    top.set_ylabel("share that is right")
    top.set_title(f"expected calibration error {found.error:.3f}", loc="left", fontsize=10)
    top.legend(fontsize=7.5, frameon=False, loc="upper left")
    below.bar(centres, found.count, width=width * 0.92, color=FAINT)
    below.set_xlim(0, 1)
    below.set_xlabel(what)
    below.set_ylabel("count")
    for axes in (top, below):
        _tidy(axes)
    return _save(figure, path)


def plot_curves(path: Path, curves: Sequence[Curve], *, most: int = 12) -> bool:
    """ROC and precision-recall curves, the first ``most`` in colours and with names, all others in grey."""
    if not curves:
        return False
    figure = _figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle="--")
    for place, curve in reversed(list(enumerate(curves))):
        hits = np.concatenate([[0], np.cumsum(curve.positive[np.argsort(-curve.scores, kind="stable")])])
        said = np.arange(len(hits))
        recall, false = hits / hits[-1], (said - hits) / max(1, int((~curve.positive).sum()))
        style: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.8, "zorder": 1}
        if place < most:
            style = {"label": f"{_short(curve.label)}  {curve.note}", "linewidth": 1.6, "zorder": 2, **_style(place)}
        left.plot(false, recall, **style)
        right.plot(recall[1:], hits[1:] / said[1:], **style)
    for axes, x, y in ((left, "false alarms", "recall"), (right, "recall", "precision")):
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _tidy(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=7.5, frameon=False)
    return _save(figure, path)


def plot_intervals(path: Path, labels: Sequence[str], found: Sequence[Interval], *, what: str) -> bool:
    """One measure of each label with its interval, the best on top."""
    known = [n for n in range(len(labels)) if not np.isnan(found[n].value)]
    order = sorted(known, key=lambda n: found[n].value)
    if len(order) < 2:
        return False
    figure = _figure(6.0, float(np.clip(1.0 + 0.24 * len(order), 2.2, 16.0)))
    axes = figure.add_subplot()
    for y, n in enumerate(order):
        axes.plot([found[n].low, found[n].high], [y, y], color=COLOURS[5], linewidth=3, solid_capstyle="round")
        axes.plot([found[n].value], [y], "o", color=COLOURS[0], markersize=4.5)
    font = 8.5 if len(order) <= 40 else 5.0
    axes.set_yticks(range(len(order)), [_short(labels[n]) for n in order], fontsize=font)
    axes.set_ylim(-0.7, len(order) - 0.3)
    lowest = np.nanmin([[found[n].value, found[n].low] for n in order])
    axes.set_xlim(min(0.5, np.floor(lowest * 10) / 10) - 0.01, 1.01)
    axes.set_xlabel(f"{what}, with 95 % interval")
    _tidy(axes)
    return _save(figure, path)


def plot_examples(path: Path, examples: Sequence[MaskExample], labels: Sequence[str], captions: Sequence[str]) -> bool:
    """Pictures with the true and the predicted mask beside them, and where the two differ."""
    if not examples:
        return False
    height, width = examples[0].picture.shape[:2]
    column = 2.9
    figure = _figure(4 * column, len(examples) * (column * height / width + 0.28) + 0.9)
    grid = figure.subplots(len(examples), 4, squeeze=False)
    colours = class_colours(len(labels))
    seen: set[int] = set()
    for row, (example, caption) in enumerate(zip(examples, captions, strict=True)):
        void = (example.truth < 0) | (example.truth >= len(labels))
        wrong = (example.predicted != example.truth) & ~void
        grey = np.repeat(example.picture.mean(axis=2, keepdims=True), 3, axis=2)
        missed = _blend(grey / 255, wrong, np.array([0.84, 0.37, 0.0]), 0.75)
        panels = (
            example.picture / 255,
            _overlay(example.picture, example.truth, colours),
            _overlay(example.picture, example.predicted, colours),
            _blend(missed, void, np.array([0.0, 0.0, 0.0]), 0.6),
        )
        share = 100 * wrong.sum() / max(1, (~void).sum())
        titles = (caption, "truth", "prediction", f"{share:.0f} % wrong (orange); no truth (black)")
        for axes, panel, title in zip(grid[row], panels, titles, strict=True):
            axes.imshow(np.clip(panel, 0, 1), interpolation="nearest")
            axes.set_title(_short(title, 44), fontsize=8, loc="left")
            axes.set_axis_off()
        seen |= {int(c) for c in np.union1d(example.truth[~void], example.predicted)}
    handles = [Patch(color=tuple(colours[c]), label=_short(labels[c])) for c in sorted(seen)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return _save(figure, path)


def class_colours(count: int) -> Floats:
    """float ``[count, 3]``: a colour for each class, by hue and then by lightness."""
    # Sky blue beside blue is hard to tell in an overlay; black is free there.
    codes = ["#333333" if code == "#56B4E9" else code for code in COLOURS]
    base = np.array([[int(code[n : n + 2], 16) / 255 for n in (1, 3, 5)] for code in codes])
    if count > 3 * len(base):
        return np.asarray(colormaps["turbo"](np.linspace(0.02, 0.98, count))[:, :3], np.float64)
    dark, light = base * 0.5, base * 0.5 + 0.5
    return np.concatenate([base, dark, light])[:count]


def _overlay(picture: NDArray[np.uint8], mask: NDArray[np.integer[Any]], colours: Floats) -> Floats:
    """The picture in the colours of its classes, with white lines between them; void stays as it is."""
    known = (mask >= 0) & (mask < len(colours))
    painted = colours[np.where(known, mask, 0)]
    mixed = np.where(known[..., None], 0.4 * picture / 255 + 0.6 * painted, picture / 255)
    edge = np.zeros(mask.shape, bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return _blend(mixed, edge, np.ones(3), 0.7)


def _blend(picture: Floats, where: NDArray[np.bool_], colour: Floats, strength: float) -> Floats:
    return np.where(where[..., None], (1 - strength) * picture + strength * colour, picture)


def _style(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % 6], "linestyle": _LINES[place // 6 % len(_LINES)]}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _short(text: str, longest: int = _LONGEST) -> str:
    """The text, its middle left out where it is too long: names often differ at the end."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest - 1) // 2 :]}"


def _save(figure: Figure, path: Path) -> bool:
    figure.savefig(path, metadata={"Software": None})
    return True
