"""A report of a model's answers: ``report.md`` with tables and pictures, and ``metrics.json`` with the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import plots
from models.errors import ModelError
from models.measures import (
    DRAWS,
    LABEL_MEASURES,
    Measure,
    caption_ranks,
    choose,
    flat,
    head_reliability,
    measure,
)
from models.metrics import Interval, confusion_matrix
from models.scored import AnswerScores, HeadScores, LabelScores, MaskExample, MaskScores, RetrievalScores, Scored

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.md"
HISTORY_FILE = "history.jsonl"
"""One JSON object per epoch, written by training."""
WORST = 10
"""Mistakes listed for each head."""
EXAMPLES = 4
"""Pictures shown with their masks."""
_TITLES = {"ap": "AP", "auc": "AUC", "f1": "F1"}


def write_report(
    folder: Path,
    scored: Scored,
    *,
    title: str,
    about: Mapping[str, str] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    draws: int = DRAWS,
) -> dict[str, float | None]:
    """Write ``report.md``, its PNG pictures and ``metrics.json`` into ``folder`` (made if need be).

    ``about`` is a table of what was evaluated and on what; ``history`` are training's records by epoch. Returns what
    ``metrics.json`` holds: flat keys ``<head>_<measure>`` and ``<head>_<label>_<measure>``, each with ``_low`` and
    ``_high`` (95 % interval over groups) and where there is one ``_baseline``.

    Raises ``ModelError`` when the folder cannot be written.
    """
    measures = measure(scored, draws)
    groups = len({row.group for row in scored.rows})
    facts = {**(about or {}), "rows": str(len(scored.rows)), "groups": str(groups)}
    lines = [f"# {title}", "", *_table(("", ""), list(facts.items())), "", *_summary(measures, draws, groups)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if plots.plot_history(folder / "history.png", history):
            lines += ["", "## Training", "", _picture("history.png", "losses and validation measures by epoch")]
        for head in scored.heads:
            lines += _section(folder, scored, head, [one for one in measures if one.head == head.head])
        numbers = flat(measures)
        (folder / METRICS_FILE).write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (folder / REPORT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"the report cannot be written to {folder} ({error.strerror or error}); free space or choose another folder"
        ) from error
    return numbers


def read_history(path: Path) -> list[dict[str, Any]]:
    """Training's records by epoch; none without the file. A last line cut off by a crash is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [record for record in records if isinstance(record, dict)]


def _summary(measures: Sequence[Measure], draws: int, groups: int) -> list[str]:
    rows = [
        (one.head, one.title, _number(one.interval.value), _range(one.interval), _number(one.baseline))
        for one in measures
        if one.label is None
    ]
    if not rows:
        return ["The manifest has no label, mask, caption or answer for any head of the model: nothing was measured."]
    said = (
        f"Intervals hold 95 % of {draws} draws of groups with replacement."
        if groups > 1
        else "All rows are of one group, so there are no intervals: give the manifest a `group` column."
    )
    header = ("head", "measure", "value", "95 % interval", "baseline")
    baseline = "The baseline is what the best answer that does not look would reach (the commonest label, chance)."
    return ["## Summary", "", *_table(header, rows, right=2), "", f"{said} {baseline}"]


def _section(folder: Path, scored: Scored, head: HeadScores, measures: Sequence[Measure]) -> list[str]:
    lines = ["", f"## Head `{head.head}`", ""]
    if not measures:
        return [*lines, "The manifest says nothing of this head."]
    match head:
        case LabelScores():
            return lines + _label_section(folder, scored, head, measures)
        case MaskScores():
            return lines + _mask_section(folder, scored, head, measures)
        case RetrievalScores():
            return lines + _retrieval_section(scored, head)
        case AnswerScores():
            return lines + _answer_section(scored, head)


def _label_section(folder: Path, scored: Scored, head: LabelScores, measures: Sequence[Measure]) -> list[str]:
    by_label = {(one.label, one.name): one.interval for one in measures}
    present = list(dict.fromkeys(one.label for one in measures if one.label is not None))
    support = {label: int((head.targets[:, head.labels.index(label)] > 0.5).sum()) for label in present}
    rows = [
        (label, str(support[label]), *(_with_range(by_label[label, name]) for name in LABEL_MEASURES))
        for label in present
    ]
    header = ("label", "rows", *(_TITLES.get(name, name) for name in LABEL_MEASURES))
    lines = [*_table(header, rows, right=1), ""]
    if head.multi_label:
        lines += ["Precision, recall and F1 are at the thresholds where events start (a half where there is none).", ""]
    if absent := [label for label in head.labels if label not in support]:
        lines += ["Not in the manifest: " + ", ".join(f"`{label}`" for label in absent) + ".", ""]
    lines += _label_pictures(folder, head, present, [by_label[label, "auc"] for label in present])
    return lines + _mistakes(scored, head)


def _label_pictures(folder: Path, head: LabelScores, present: Sequence[str], aucs: Sequence[Interval]) -> list[str]:
    choice = choose(head, among_present=head.multi_label)
    lines = []
    if len(choice.rows) and len(choice.labels) > 1:
        among = "rows with one label, choice among the labels present" if head.multi_label else "rows"
        matrix = confusion_matrix(choice.predicted, choice.truth, len(choice.labels))
        plots.plot_confusion(folder / f"{head.head}_confusion.png", matrix, choice.labels, unit=among)
        lines += [_picture(f"{head.head}_confusion.png", "confusion matrix"), ""]
    found = head_reliability(head)
    if found.count.sum():
        what = "score" if head.multi_label else "score of the chosen label"
        plots.plot_reliability(folder / f"{head.head}_reliability.png", found, what=what)
        lines += [_picture(f"{head.head}_reliability.png", "reliability diagram"), ""]
    if plots.plot_intervals(folder / f"{head.head}_auc.png", present, aucs, what="area under the ROC curve"):
        lines += [_picture(f"{head.head}_auc.png", "area under the ROC curve by label"), ""]
    if plots.plot_curves(folder / f"{head.head}_curves.png", _curves(head, present, aucs)):
        lines += [_picture(f"{head.head}_curves.png", "ROC and precision-recall curves"), ""]
    return lines


def _curves(head: LabelScores, present: Sequence[str], aucs: Sequence[Interval]) -> list[plots.Curve]:
    """Curves of the labels that have positives and negatives, the hardest first."""
    found = []
    order = sorted(range(len(present)), key=lambda n: (math.isnan(aucs[n].value), aucs[n].value))
    for n in order:
        column = head.labels.index(present[n])
        known = ~np.isnan(head.targets[:, column])
        if not math.isnan(aucs[n].value):
            positive = head.targets[known, column] > 0.5
            found.append(plots.Curve(present[n], head.scores[known, column], positive, f"AUC {aucs[n].value:.2f}"))
    return found


def _mistakes(scored: Scored, head: LabelScores) -> list[str]:
    """The rows answered wrongly with the greatest confidence."""
    choice = choose(head, among_present=head.multi_label)
    wrong = np.flatnonzero(choice.predicted != choice.truth)
    if not len(wrong):
        return ["No row with one label was answered wrongly.", ""] if len(choice.rows) else []
    worst = wrong[np.argsort(-choice.confidence[wrong], kind="stable")][:WORST]
    rows = []
    for n in worst:
        row, truth = int(choice.rows[n]), choice.labels[choice.truth[n]]
        own = float(head.scores[row, head.labels.index(truth)])
        said = choice.labels[choice.predicted[n]]
        rows.append((scored.rows[row].name, truth, f"{own:.2f}", said, f"{choice.confidence[n]:.2f}"))
    title = f"### Worst mistakes ({len(rows)} of {len(wrong)}; {len(choice.rows)} rows)"
    return [title, "", *_table(("row", "truth", "its score", "said", "its score"), rows), ""]


def _mask_section(folder: Path, scored: Scored, head: MaskScores, measures: Sequence[Measure]) -> list[str]:
    total = head.confusions.sum(axis=0)
    present = [one for one in measures if one.label is not None]
    share = total.sum(axis=1) / total.sum()
    rows = [
        (str(one.label), f"{100 * share[head.labels.index(str(one.label))]:.1f} %", _with_range(one.interval))
        for one in present
    ]
    lines = [*_table(("class", "share of pixels", "intersection over union"), rows, right=1), ""]
    plots.plot_confusion(folder / f"{head.head}_confusion.png", total, head.labels, unit="pixels")
    lines += [_picture(f"{head.head}_confusion.png", "confusion matrix of pixels"), ""]
    shown = _spread(head.examples)
    names = [scored.rows[example.row].name for example in shown]
    if plots.plot_examples(folder / f"{head.head}_examples.png", shown, head.labels, names):
        lines += [_picture(f"{head.head}_examples.png", "pictures, true masks, predicted masks, differences"), ""]
    right = np.trace(head.confusions, axis1=1, axis2=2) / np.maximum(head.confusions.sum(axis=(1, 2)), 1)
    counted = np.flatnonzero(head.confusions.sum(axis=(1, 2)))
    worst = counted[np.argsort(right[counted], kind="stable")][:WORST]
    table = [(scored.rows[row].name, f"{100 * right[row]:.1f} %") for row in worst]
    return [*lines, "### Worst pictures", "", *_table(("row", "pixels right"), table, right=1), ""]


def _spread(examples: Sequence[MaskExample]) -> list[MaskExample]:
    """From the worst to the best, evenly."""

    def wrong(example: MaskExample) -> float:
        return float(np.mean((example.predicted != example.truth) & (example.truth >= 0)))

    order = sorted(examples, key=wrong, reverse=True)
    picked = np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).round().astype(int)
    return [order[n] for n in picked.tolist()]


def _retrieval_section(scored: Scored, head: RetrievalScores) -> list[str]:
    asked = [row for row, caption in enumerate(head.captions) if caption.strip()]
    ranks, right = caption_ranks(head, np.array(asked, np.int64))
    worst = np.argsort(-ranks, kind="stable")[:WORST]
    rows = [
        (scored.rows[asked[n]].name, head.captions[asked[n]], str(ranks[n]), str(right[n]))
        for n in worst
        if ranks[n] > 1
    ]
    lines = [
        f"Each of {len(asked)} captions asks for its clip among {len(head.captions)}. Several clips may share a "
        "caption (but for case and punctuation): any of them counts as found.",
        "",
        f"Median rank {np.median(ranks):g}.",
        "",
    ]
    if rows:
        lines += ["### Worst mistakes", "", *_table(("row", "caption", "rank", "clips that count"), rows, right=2), ""]
    return lines


def _answer_section(scored: Scored, head: AnswerScores) -> list[str]:
    asked = [row for row, answer in enumerate(head.answers) if answer.strip()]
    rows = [
        (scored.rows[row].name, head.questions[row], head.answers[row], head.given[row]) for row in asked[: 2 * WORST]
    ]
    lines = ["Case and punctuation do not count.", "", "### Answers", ""]
    return [*lines, *_table(("row", "question", "wanted", "given"), rows), ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """A Markdown table in columns of even width; columns from ``right`` on hold numbers."""
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[n]) for row in cells)) for n in range(len(header))]
    numeric = [right is not None and n >= right for n in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(parts)} |"

    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, numeric, strict=True)]
    return [line(cells[0]), f"| {' | '.join(rule)} |", *(line(row) for row in cells[1:])]


def _picture(name: str, title: str) -> str:
    return f"![{title}]({name})"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _range(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"


def _with_range(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    ends = "" if math.isnan(interval.low) else f" ({interval.low:.2f}-{interval.high:.2f})"
    return f"{interval.value:.2f}{ends}"
