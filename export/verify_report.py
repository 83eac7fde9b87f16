"""What a verification found: tables for the terminal, and an HTML file with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape as plain
from rich.table import Table

from engines.manifest import GraphSpec, Manifest
from engines.measure import answers_of
from engines.parity import (
    BatchLatency,
    GraphParity,
    OutputParity,
    agreement_needed,
    bound_of,
    decision_bound_of,
    mask_bound_of,
)
from export.verify import Verification, Verified
from export.verify_plots import Bar, Line, bars_from_zero, log_bars, log_lines

_WITHIN, _OVER, _FAILS = "passes", "over", "fails"


def verdict(one: Verified) -> str:
    """In one word."""
    return _WITHIN if one.problem is None else _FAILS if one.parity is None else _OVER


def share_of_bound(manifest: Manifest, precision: str, out: OutputParity) -> float:
    """An output's error over what is allowed: up to 1 is within the bound, infinite where nothing is allowed."""
    error = (out.max_abs_error if precision == "fp32" else out.relative_error) or 0.0
    allowed = bound_of(manifest, precision)
    if out.mask_agreement is not None:
        least = mask_bound_of(manifest, precision)
        error, allowed = 1 - out.mask_agreement, None if least is None else 1 - least
    return error / allowed if allowed else math.inf if error else 0.0


def bound_text(manifest: Manifest, graph: GraphSpec, precision: str) -> str:
    """What is allowed: of masks a share of equal pixels, in fp32 a largest error, else one in standard deviations."""
    bound, least = bound_of(manifest, precision), mask_bound_of(manifest, precision)
    masks = {tensor.dtype == "uint8" for tensor in answers_of(manifest, graph.name)}
    texts = []
    if False in masks and bound is not None:
        texts.append(f"{bound:g} {'max' if precision == 'fp32' else 'relative'}")
    if True in masks and least is not None:
        texts.append(f"{least:.1%} px")
    return ", ".join(texts)


FIGURES = ("max error", "relative", "top-1", "equal px", "mask IoU", "cosine")
DECISIONS = "decisions"


def decided(entry: GraphParity | None) -> str:
    """Share of windows in which the same is decided, of the head that differs most; empty where nothing is decided."""
    found = () if entry is None else entry.decisions
    return f"{min(one.agreement for one in found):.1%}" if found else ""


def figures(outputs: Sequence[OutputParity]) -> tuple[str, ...]:
    """Worst over outputs, as ``FIGURES``; empty where there is none."""

    def worst(name: str, form: str, pick: Callable[[list[float]], float] = min) -> str:
        values = [value for out in outputs if (value := getattr(out, name)) is not None]
        return format(pick(values), form) if values else ""

    return (
        worst("max_abs_error", ".2g", max),
        worst("relative_error", ".2g", max),
        worst("top1_agreement", ".1%"),
        worst("mask_agreement", ".2%"),
        worst("mask_iou", ".4f"),
        worst("cosine", ".6f"),
    )


def compared_with(found: Verification) -> str:
    """The reference and the clips, and why it is not the model itself where it is not."""
    windows = sum(clip.windows for clip in found.clips)
    text = f"compared with {found.reference}, on {windows} windows of {', '.join(clip.name for clip in found.clips)}"
    return f"{text}; {_not_torch(found)}" if found.no_torch else text


def _not_torch(found: Verification) -> str:
    return (
        f"this is not PyTorch, since of pack {found.manifest.name} {found.no_torch}; "
        "name the model with --model to compare with it"
    )


def terminal_tables(found: Verification) -> Iterator[RenderableType]:
    """Errors by graph and engine, decisions, latency, what was not run and why, and what it was compared with."""
    yield _errors(found)
    yield ""
    if (decisions := _decisions(found)).row_count:
        yield decisions
        yield ""
    yield _latencies(found)
    yield ""
    for reason in found.not_run:
        yield f"not run: {plain(reason)}"
    yield plain(compared_with(found))


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("graph", "backend", "precision"):
        table.add_column(title)
    for title in titles:
        table.add_column(title, justify="right")
    return table


def _errors(found: Verification) -> Table:
    table = _table(*FIGURES, "bound", "")
    for one in found.results:
        cells = figures(one.parity.outputs if one.parity is not None else ())
        said = verdict(one)
        bound = bound_text(found.manifest, found.manifest.graph(one.graph), one.precision)
        style = "green" if said == _WITHIN else "bold red"
        table.add_row(one.graph, one.backend, one.precision, *cells, bound, f"[{style}]{said}[/]")
    return table


def _decisions(found: Verification) -> Table:
    table = _table("head", "windows", "same", "at least", "same, on and off")
    for one in found.results:
        least = decision_bound_of(found.manifest, one.precision)
        for head in one.parity.decisions if one.parity is not None else ():
            needed = "" if least is None else f"{agreement_needed(least, head.windows):.1%}"
            windows = f"{head.windows}{'' if head.held_out else ' calibrated on'}"
            cells = (head.head, windows, f"{head.agreement:.1%}", needed, f"{head.both_sides:.1%}")
            table.add_row(one.graph, one.backend, one.precision, *cells)
    return table


def _latencies(found: Verification) -> Table:
    sizes = _sizes(found)
    table = _table(*(title for n in sizes for title in (f"batch {n}\np50 ms", "\np95 ms", "\nitems/s")))
    for one in found.results:
        if one.parity is not None:
            times = _times(one.parity)
            cells = [text for n in sizes for text in _latency_cells(times.get(n))]
            table.add_row(one.graph, one.backend, one.precision, *cells)
    return table


def _sizes(found: Verification) -> list[int]:
    entries = [one.parity for one in found.results if one.parity is not None]
    return sorted({time.batch for entry in entries for time in entry.latency})


def _times(entry: GraphParity) -> dict[int, BatchLatency]:
    return {time.batch: time for time in entry.latency}


def _latency_cells(time: BatchLatency | None) -> tuple[str, str, str]:
    return ("", "", "") if time is None else (f"{time.p50_ms:.2f}", f"{time.p95_ms:.2f}", f"{time.per_second:.0f}")


def write_report(path: Path, found: Verification) -> None:
    """Write the report as one HTML file that needs nothing else. Raises ``OSError``."""
    path.write_text(html_report(found, datetime.now(UTC)), encoding="utf-8")


def html_report(found: Verification, at: datetime) -> str:
    """The page: what was compared with what, verdicts, plots, and every output's figures. All text is escaped."""
    title = f"Pack {found.manifest.name} {found.manifest.version}"
    parts = [_head(found, title, at), *_summary(found)]
    for graph in found.manifest.graphs:
        if results := [one for one in found.results if one.graph == graph.name]:
            parts += _graph_section(found, graph, results)
    if found.not_run:
        parts.append("<h2>Not run</h2><ul>" + "".join(f"<li>{escape(why)}</li>" for why in found.not_run) + "</ul>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(found: Verification, title: str, at: datetime) -> str:
    failed = sum(one.problem is not None for one in found.results)
    said = f"{failed} of {len(found.results)} over their bounds" if failed else "all within their bounds"
    manifest = found.manifest
    facts = {
        "compared with": found.reference,
        "clips": ", ".join(f"{clip.name} ({clip.windows} windows)" for clip in found.clips),
        "processor": found.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "pack": f"sha256 {manifest.sha256()[:16]}…, checkpoint {manifest.checkpoint_sha256[:16]}…",
        "measured": f"{at:%Y-%m-%d %H:%M} UTC",
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    kind = "bad" if failed else "good"
    return f'<h1>{escape(title)} <span class="badge {kind}">{escape(said)}</span></h1><dl>{rows}</dl>'


def _summary(found: Verification) -> Iterator[str]:
    if found.no_torch:
        yield f'<p class="warn">{escape(_not_torch(found))}</p>'
    for line in found.problems:
        yield f'<p class="problem">{escape(line)}</p>'
    titles = ("graph", "backend", "precision", *FIGURES, DECISIONS, "bound", "")
    yield _html_table(titles, (_summary_row(found, one) for one in found.results), text=3)


def _summary_row(found: Verification, one: Verified) -> tuple[str, ...]:
    cells = figures(one.parity.outputs if one.parity is not None else ())
    bound = bound_text(found.manifest, found.manifest.graph(one.graph), one.precision)
    return one.graph, one.backend, one.precision, *cells, decided(one.parity), bound, verdict(one)


def _html_table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, text: int) -> str:
    """The first ``text`` columns hold words, the others figures; a last cell that is a verdict stands out."""

    def cell(n: int, value: str, tag: str) -> str:
        kind = "" if n < text else " class='number'"
        if tag == "td" and value in (_WITHIN, _OVER, _FAILS):
            kind = f" class='{'good' if value == _WITHIN else 'bad'}'"
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    head = "".join(cell(n, title, "th") for n, title in enumerate(titles))
    body = "".join("<tr>" + "".join(cell(n, v, "td") for n, v in enumerate(row)) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _graph_section(found: Verification, graph: GraphSpec, results: Sequence[Verified]) -> Iterator[str]:
    names = {(one.backend, one.precision): n for n, one in enumerate(_engines(found))}

    def colour(one: Verified) -> int:
        return names[one.backend, one.precision]

    yield f"<h2>Graph {escape(graph.name)}</h2>"
    measured = [(one, one.parity) for one in results if one.parity is not None]
    if not measured:
        return
    yield "<h3>Error as a share of its bound</h3>"
    yield "<p class='note'>The worst output of each engine; what reaches the line is over its bound.</p>"
    yield log_bars(
        [_error_bar(found.manifest, one, entry, colour(one)) for one, entry in measured], limit=1.0, title="Errors"
    )
    yield "<h3>Error by window</h3>"
    mask = all(tensor.dtype == "uint8" for tensor in answers_of(found.manifest, graph.name))
    unit = "share of the pixels that differ" if mask else "largest absolute difference, over all outputs"
    yield f"<p class='note'>{unit}; none at all lies on the lower edge.</p>"
    lines = [Line(_name(one), _by_window(entry), colour(one)) for one, entry in measured]
    yield log_lines(lines, limit=None, title="Errors by window")
    if any(entry.latency for _, entry in measured):
        yield "<h3>Time for one item</h3>"
        yield "<p class='note'>Milliseconds: the median, and a line to the 95th percentile.</p>"
        bars = [bar for one, entry in measured for bar in _time_bars(one, entry, colour(one))]
        yield bars_from_zero(bars, title="Time for one item")
    rows = [
        (
            one.backend,
            one.precision,
            out.tensor,
            *figures([out]),
            f"{share_of_bound(found.manifest, one.precision, out):.2g}",
        )
        for one, entry in measured
        for out in entry.outputs
    ]
    table = _html_table(("backend", "precision", "output", *FIGURES, "of its bound"), rows, text=3)
    yield f"<details><summary>Every output</summary>{table}</details>"


def _engines(found: Verification) -> list[Verified]:
    """One result of each backend and precision."""
    return list({(one.backend, one.precision): one for one in reversed(found.results)}.values())[::-1]


def _name(one: Verified) -> str:
    return f"{one.backend} {one.precision}"


def _error_bar(manifest: Manifest, one: Verified, entry: GraphParity, colour: int) -> Bar:
    shares = {out.tensor: share_of_bound(manifest, one.precision, out) for out in entry.outputs}
    worst = max(shares, key=lambda name: shares[name])
    figure = f"{shares[worst]:.2g} of its bound: {worst}" if shares[worst] > 0 else "no difference"
    return Bar(_name(one), shares[worst], figure, colour, bad=one.problem is not None)


def _by_window(entry: GraphParity) -> tuple[float, ...]:
    return tuple(map(max, zip(*(out.window_errors for out in entry.outputs), strict=True)))


def _time_bars(one: Verified, entry: GraphParity, colour: int) -> Iterator[Bar]:
    for time in entry.latency:
        figure = f"{time.p50_ms / time.batch:.2f} ms, {time.per_second:.0f}/s"
        name = f"{_name(one)}, batch {time.batch}"
        yield Bar(name, time.p50_ms / time.batch, figure, colour, whisker=time.p95_ms / time.batch)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8; --page: #fff; --good: #0a7d4f;
 --bad: #b3261e; --warn: #fff4d6; --warn-ink: #6b4e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #333b44; --page: #14181c;
 --good: #4cc38a; --bad: #ff7a70; --warn: #3a2f10; --warn-ink: #f2d68a; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 16px; } h2 { font-size: 20px; margin: 40px 0 0; border-top: 1px solid var(--line);
 padding-top: 20px; } h3 { font-size: 15px; margin: 22px 0 0; }
.badge { font-size: 14px; font-weight: 600; padding: 3px 10px; border-radius: 12px; vertical-align: middle;
 border: 1px solid currentColor; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.note { color: var(--soft); margin: 0 0 6px; font-size: 13px; }
.warn { background: var(--warn); color: var(--warn-ink); padding: 10px 14px; border-radius: 6px; }
.problem { border-left: 4px solid var(--bad); padding: 4px 12px; margin: 8px 0; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 0 20px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 600; } th, td { padding: 4px 10px 4px 0;
 border-bottom: 1px solid var(--line); white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 12px; } svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .figure { font-size: 12px; fill: var(--soft); paint-order: stroke;
 stroke: var(--page); stroke-width: 4px; } svg .figure.bad { fill: var(--bad); font-weight: 600; }
svg .grid { stroke: var(--line); } svg .whisker { stroke: var(--soft); stroke-width: 1.5; }
svg .limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .limit-name { fill: var(--bad); font-size: 12px; } svg polyline { fill: none; stroke-width: 1.5; opacity: .6; }
svg rect.bad { stroke: var(--bad); stroke-width: 2; }
.c0 { fill: #0072b2; stroke: #0072b2; } .c1 { fill: #d55e00; stroke: #d55e00; } .c2 { fill: #009e73; stroke: #009e73; }
.c3 { fill: #cc79a7; stroke: #cc79a7; } .c4 { fill: #e69f00; stroke: #e69f00; } .c5 { fill: #56b4e9; stroke: #56b4e9; }
.c6 { fill: #8a8f98; stroke: #8a8f98; } svg polyline { fill: none !important; }
"""
