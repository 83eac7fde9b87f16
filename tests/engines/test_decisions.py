"""What is decided on a head's labels, and the bound on how often two engines decide otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.decisions import DEFAULT_THRESHOLD, Agreement, agreement, scores_of
from engines.errors import ParityFailed
from engines.manifest import DEFAULT_DECISION_BOUNDS, Head, HeadKind, Manifest, Threshold, read_manifest
from engines.measure import compare_decisions
from engines.open import open_pack
from engines.parity import DecisionParity, agreement_needed, read_parity, within_bounds, write_parity
from stream.events import DEFAULT_THRESHOLD as OF_THE_SERVICE
from stream.inference import activate

ACTION = Head(
    name="action",
    kind=HeadKind.ACTION,
    output="logits",
    labels=("walk", "run", "other"),
    background=("other",),
    activation="sigmoid",
    temperature=2.0,
    thresholds={"walk": Threshold(on=0.7, off=0.3)},
)
SOUND = Head(
    name="sound",
    kind=HeadKind.CLASS,
    output="logits",
    labels=("bark", "rain"),
    background=("rain",),
    activation="softmax",
)


def logits(head: Head, *scores: list[float]) -> np.ndarray:
    """Logits of sigmoid scores."""
    p = np.array(scores)
    return np.asarray(head.temperature * np.log(p / (1 - p)), np.float32)


def decision(agrees: float, windows: int = 40, strict: float | None = None) -> DecisionParity:
    both = agrees if strict is None else strict
    return DecisionParity(head="action", windows=windows, agreement=agrees, both_sides=both, label_agreement=1.0)


def test_scores_and_thresholds_are_those_of_the_service() -> None:
    random = np.random.default_rng(0).normal(0, 30, (50, 3)).astype(np.float32)
    for head in (ACTION, SOUND):
        given = random[:, : len(head.labels)]
        np.testing.assert_allclose(scores_of(head, given), activate(head, given), atol=1e-6)
    assert DEFAULT_THRESHOLD == OF_THE_SERVICE


@pytest.mark.parametrize(
    ("want", "got", "found"),
    [
        ([0.75, 0.1, 0.1], [0.99, 0.2, 0.9], Agreement(1.0, 1.0, 1.0)),  # background is never reported
        ([0.71, 0.1, 0.1], [0.69, 0.1, 0.1], Agreement(0.0, 0.0, 0.75)),
        ([0.31, 0.1, 0.1], [0.29, 0.1, 0.1], Agreement(1.0, 0.0, 0.75)),  # an event would end: not decided otherwise
        ([0.1, 0.61, 0.1], [0.1, 0.59, 0.1], Agreement(0.0, 0.0, 0.75)),  # thresholds not given are the default
        ([0.7005, 0.1, 0.1], [0.6, 0.1, 0.1], Agreement(1.0, 1.0, 1.0)),  # a tie
        ([0.75, 0.1, 0.1], [float("nan"), 0.1, 0.1], Agreement(0.0, 0.0, 0.5)),
    ],
)
def test_sides_of_thresholds(want: list[float], got: list[float], found: Agreement) -> None:
    assert agreement(ACTION, logits(ACTION, want), logits(ACTION, got)) == found


def test_the_best_label_counts_where_labels_exclude_each_other() -> None:
    want = np.array([[0.1, 0.0], [0.1, 0.0], [0.0001, 0.0]], np.float32)
    got = np.array([[0.0, 0.1], [0.2, 0.0], [0.0, 0.1]], np.float32)
    # The first has another best label, the second not, the third is a tie; none crosses a threshold.
    assert agreement(SOUND, want, got) == Agreement(2 / 3, 2 / 3, 1.0)
    assert agreement(SOUND.model_copy(update={"activation": "sigmoid"}), want, got).windows == 1.0


def test_windows_that_were_calibrated_on_count_only_where_there_are_no_others(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    heads = manifest.branches[0].heads
    want = [{head.output: np.full((1, len(head.labels)), 5, np.float32) for head in heads}] * 2
    got = [{name: -logits for name, logits in want[0].items()}, want[1]]
    graph = manifest.branches[0].graph
    manifest = manifest.model_copy(update={"branches": tuple(b for b in manifest.branches if b.graph == graph)})

    def found(*seen: bool) -> tuple[int, bool, float]:
        first = compare_decisions(manifest, graph, want, got, seen)[0]
        return first.windows, first.held_out, first.agreement

    assert found() == (2, True, 0.5)
    assert found(True, False) == (1, True, 1.0)
    assert found(False, True) == (1, True, 0.0)
    assert found(True, True) == (2, False, 0.5)


@pytest.mark.parametrize(
    ("precision", "one", "needed"),
    [
        ("fp32", decision(0.999, 1000), "100.0%"),
        ("int8", decision(0.95), None),
        ("int8", decision(0.9), None),  # 4 of 40 may be chance
        ("int8", decision(0.875), "90.0%"),
        ("int8", decision(0.75, 4), None),
        ("int8", decision(0.5, 4), "75.0%"),
        ("int8", decision(0.93, 1000), "93.8%"),
        ("int8", decision(0.94, 1000), None),
    ],
)
def test_decisions_are_bounded_by_the_manifest(
    tiny: Path, precision: str, one: DecisionParity, needed: str | None
) -> None:
    manifest = read_manifest(tiny).model_copy(update={"parity_bounds": {precision: 1.0}})
    said = within_bounds(manifest, precision, (), (one,))
    if needed is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"head action decides the same in {one.agreement:.1%} of {one.windows} windows")
        assert said.endswith(f"at least {needed} are needed")


@pytest.mark.parametrize(("windows", "may_differ"), [(1, 0), (4, 1), (12, 2), (20, 3), (40, 4), (100, 9)])
def test_what_may_be_chance(windows: int, may_differ: int) -> None:
    """Upper 5 % points of the binomial distribution at a rate of 0.05, from tables."""
    assert round(windows * (1 - agreement_needed(0.95, windows))) == may_differ
    assert agreement_needed(1.0, windows) == 1.0


def test_a_conversion_is_held_to_more(tiny: Path) -> None:
    manifest = read_manifest(tiny)
    assert agreement_needed(0.95, 4, share=0.75) == pytest.approx(0.9625)
    one = decision(1.0, strict=0.96)
    assert within_bounds(manifest, "int8", (), (one,)) is None
    assert "96.0% of 40 windows" in str(within_bounds(manifest, "int8", (), (one,), share=0.75))


def test_a_pack_without_the_field_keeps_loading_with_the_default(tiny: Path) -> None:
    written = read_manifest(tiny).model_dump(mode="json")
    del written["decision_bounds"]
    assert Manifest.model_validate(written).decision_bounds == DEFAULT_DECISION_BOUNDS


def test_a_pack_that_decides_otherwise_is_refused(tiny: Path) -> None:
    report = read_parity(tiny)
    assert report is not None
    entries = tuple(
        entry.model_copy(update={"decisions": (decision(0.9),)}) if entry.graph == "watch_window" else entry
        for entry in report.entries
    )
    write_parity(tiny, report.model_copy(update={"entries": entries}))
    with pytest.raises(ParityFailed, match=r"graph watch_window on onnxruntime fp32 .*head action decides .*choose"):
        open_pack(tiny, backend="onnxruntime")
