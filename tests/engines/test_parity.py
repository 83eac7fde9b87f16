"""The gate at load: no report, a report for something else, errors over the bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.errors import ManifestError, ParityFailed, ParityMissing
from engines.manifest import DEFAULT_BOUNDS, PARITY_FILE, Manifest, read_manifest, write_manifest
from engines.measure import compare, mean_iou, repeat_to
from engines.open import open_pack
from engines.parity import (
    GraphParity,
    OutputParity,
    ParityReport,
    check_parity,
    read_parity,
    within_bounds,
    write_parity,
)


def edit(folder: Path, change: Callable[[GraphParity], GraphParity]) -> None:
    report = read_parity(folder)
    assert report is not None
    entries = tuple(change(entry) if entry.graph == "watch_window" else entry for entry in report.entries)
    write_parity(folder, report.model_copy(update={"entries": entries}))


def test_the_report_survives_the_file(tiny: Path) -> None:
    report = read_parity(tiny)
    assert report is not None
    write_parity(tiny, report)
    assert read_parity(tiny) == report
    assert {entry.passed for entry in report.entries} == {True}


def test_a_pack_without_report_is_refused_unless_allowed(tiny: Path) -> None:
    (tiny / PARITY_FILE).unlink()
    with pytest.raises(ParityMissing, match=r"pack tiny: graph watch_encoder on onnxruntime fp32 .*export the pack"):
        open_pack(tiny, backend="onnxruntime")
    with pytest.raises(ParityMissing, match="graph watch_encoder"):
        open_pack(tiny)
    open_pack(tiny, backend="onnxruntime", require_parity=False).close()


def test_a_report_of_another_graph_file_does_not_count(tiny: Path) -> None:
    edit(tiny, lambda entry: entry.model_copy(update={"onnx_sha256": "1" * 64}))
    with pytest.raises(ParityMissing, match="graph watch_window on onnxruntime fp32"):
        open_pack(tiny, backend="onnxruntime")


def test_a_precision_that_was_not_measured_is_refused(tiny: Path) -> None:
    report = read_parity(tiny)
    with pytest.raises(ParityMissing, match="on openvino bf16"):
        check_parity(report, read_manifest(tiny), "openvino", "bf16")


@pytest.mark.parametrize("passed", [True, False])
def test_an_error_over_the_bound_is_refused_whatever_the_verdict(tiny: Path, passed: bool) -> None:
    far = OutputParity(tensor="action_logits", max_abs_error=0.25, mean_abs_error=0.1)
    edit(tiny, lambda entry: entry.model_copy(update={"outputs": (far,), "passed": passed}))
    with pytest.raises(ParityFailed) as caught:
        open_pack(tiny, backend="onnxruntime")
    assert "graph watch_window on onnxruntime fp32" in str(caught.value)
    assert "action_logits is off by 0.25, the bound is 0.001; choose another backend" in str(caught.value)


def test_auto_leaves_out_a_backend_that_fails(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    far = OutputParity(tensor="action_logits", max_abs_error=0.25)

    def spoil(entry: GraphParity) -> GraphParity:
        return entry.model_copy(update={"outputs": (far,)}) if entry.backend == "onnxruntime" else entry

    edit(tiny, spoil)
    assert open_pack(tiny, cache=tmp_path).engines["watch_window"].spec.backend == "openvino"


def test_a_failed_verdict_is_believed(tiny: Path) -> None:
    edit(tiny, lambda entry: entry.model_copy(update={"passed": False}))
    with pytest.raises(ParityFailed, match="the report says it did not pass"):
        open_pack(tiny, backend="onnxruntime")


def test_a_mask_that_differs_is_refused(tiny: Path) -> None:
    bad = OutputParity(tensor="scene_mask", mask_agreement=0.9, mask_iou=0.8)
    edit(tiny, lambda entry: entry.model_copy(update={"outputs": (bad,)}))
    with pytest.raises(ParityFailed, match=r"mask scene_mask agrees on 90.00% of pixels"):
        open_pack(tiny, backend="onnxruntime")


@pytest.mark.parametrize(
    ("precision", "agreement", "bounds", "message"),
    [
        ("fp32", 0.9985, {}, "mask m agrees on 99.85% of pixels, at least 99.9% are needed"),
        ("bf16", 0.935, {}, None),
        ("bf16", 0.925, {}, "mask m agrees on 92.50% of pixels, at least 93.0% are needed"),
        ("int8", 0.86, {}, None),
        ("int8", 0.84, {}, "mask m agrees on 84.00% of pixels, at least 85.0% are needed"),
        ("int8", 0.86, {"int8": 0.9}, "mask m agrees on 86.00% of pixels, at least 90.0% are needed"),
        ("bf16", 1.0, {"int8": 0.9}, "the manifest sets no bound on masks for precision bf16"),
    ],
)
def test_masks_are_bounded_by_the_manifest(
    tiny: Path, precision: str, agreement: float, bounds: dict[str, float], message: str | None
) -> None:
    written = json.loads((tiny / "manifest.json").read_text())
    assert written["mask_bounds"] == {"fp32": 0.999, "fp16": 0.99, "bf16": 0.93, "int8": 0.85}
    written |= {"parity_bounds": DEFAULT_BOUNDS, "mask_bounds": bounds or written["mask_bounds"]}
    manifest = Manifest.model_validate(written)
    out = OutputParity(tensor="m", mask_agreement=agreement, mask_iou=0.5)
    assert within_bounds(manifest, precision, (out,)) == message
    if message is not None and agreement < 1:
        # What may use a share of what is allowed needs more.
        just = OutputParity(tensor="m", mask_agreement=manifest.mask_bounds[precision], mask_iou=0.5)  # type: ignore[index]
        assert within_bounds(manifest, precision, (just,)) is None
        assert "are needed" in str(within_bounds(manifest, precision, (just,), share=0.75))


def test_a_precision_without_bound_fails(tiny: Path) -> None:
    write_manifest(tiny, read_manifest(tiny).model_copy(update={"parity_bounds": {}}))
    with pytest.raises(ParityFailed, match="no bound for precision fp32"):
        open_pack(tiny, backend="onnxruntime")


def test_a_damaged_report_names_the_file_and_the_field(tiny: Path) -> None:
    (tiny / PARITY_FILE).write_text('{"pack": "tiny"}')
    with pytest.raises(ParityMissing, match=r"parity.json: reference: .*export the pack again"):
        open_pack(tiny, backend="onnxruntime")


def test_compare_measures_what_it_says() -> None:
    want = np.array([[0.0, 1.0], [3.0, 2.0]], np.float32)
    got = np.array([[0.0, 1.5], [1.0, 2.0]], np.float32)
    found = compare("x", want, got, logits=True)
    assert (found.max_abs_error, found.mean_abs_error, found.top1_agreement) == (2.0, 0.625, 0.5)
    assert found.relative_error == pytest.approx(np.sqrt(4.25 / 4) / np.sqrt(1.25))
    mask = np.array([[[0, 0, 1, 1]]], np.uint8)
    other = np.array([[[0, 1, 1, 1]]], np.uint8)
    assert compare("m", mask, other).mask_agreement == 0.75
    assert mean_iou(mask, other) == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(ManifestError, match=r"output x is float32\[2, 1\]"):
        compare("x", want, got[:, :1])


def test_repeat_to_takes_items_in_turn() -> None:
    assert repeat_to({"x": np.array([1, 2])}, 5)["x"].tolist() == [1, 2, 1, 2, 1]


def test_an_unknown_field_in_a_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="surprise"):
        ParityReport.model_validate(
            {"pack": "p", "reference": "r", "machine": "m", "clips": (), "entries": (), "surprise": 1}
        )
