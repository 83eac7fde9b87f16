"""Packs against the models that they came from: what is found, kept and shown, and what is known of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console

from engines import backends
from engines.cache import ENGINES_FOLDER, list_cache
from engines.errors import BackendUnavailable
from engines.manifest import PARITY_FILE, PackSource, file_sha256, read_manifest, write_manifest
from engines.parity import read_parity
from export.adapters.common import ExportOptions
from export.build import ExportError, GraphToExport, PackToWrite, write_pack
from export.source import Note, note_of, recall, remember, source_of
from export.verify import FALLBACK, Verification, verify_pack
from export.verify_report import html_report, terminal_tables

Verify = Callable[..., Verification]


@pytest.fixture
def remembered(conv_pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small pack as one that was exported here: its model is built again by what is noted of it."""
    cache = tmp_path / "cache"
    note = Note(model="own:factory")
    manifest = read_manifest(conv_pack.folder).model_copy(update={"source": source_of(note)})
    write_manifest(conv_pack.folder, manifest)
    remember(note, manifest, cache)
    graph = GraphToExport(
        "small", conv_pack.module, {"frames": torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8)}, ("logits", "mask")
    )
    pack = PackToWrite("conv", "1", manifest.checkpoint_sha256, (graph,), manifest.branches)
    monkeypatch.setattr("export.model.read_model", lambda what, options: pack)
    return cache


def verified(pack: Any, cache: Path, **more: Any) -> Verification:
    return verify_pack(pack.folder, clips=[pack.clip], cache=cache, batch_sizes=(1, 4), **more)


def broken(folder: Path, value: float) -> None:
    """A bias of the last layer that is another, in a graph that the manifest agrees with."""
    path = folder / "small.onnx"
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
    bias.CopyFrom(numpy_helper.from_array(np.full(3, value, np.float32), bias.name))
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(folder)
    graph = manifest.graph("small").model_copy(update={"sha256": file_sha256(path)})
    write_manifest(folder, manifest.model_copy(update={"graphs": (graph,)}))


def test_every_backend_against_the_model_itself(conv_pack: Any, remembered: Path) -> None:
    told: list[str] = []
    found = verified(conv_pack, remembered, progress=told.append)
    assert found.reference == f"torch {torch.__version__}"
    assert (found.no_torch, found.problems) == ("", [])
    ran = {(one.backend, one.precision) for one in found.results}
    assert {("onnxruntime", "fp32"), ("torch", "fp32")} <= ran
    assert found.versions.keys() == {backend for backend, _ in ran}
    assert "comparing onnxruntime fp32" in told
    for one in found.results:
        assert one.parity is not None
        assert [time.batch for time in one.parity.latency] == [1, 4]
        logits, mask = one.parity.outputs
        assert logits.top1_agreement is not None and mask.mask_iou is not None
        count = 1 if one.backend == "torch" else len(logits.window_errors)
        assert len(mask.window_errors) == count == one.parity.samples
        assert logits.max_abs_error == pytest.approx(max(logits.window_errors), rel=0.01)
    assert any("has no int8 file for onnxruntime; run `sightwire compile`" in line for line in found.not_run)


def test_what_was_measured_is_in_the_pack(conv_pack: Any, remembered: Path) -> None:
    (conv_pack.folder / PARITY_FILE).unlink()
    found = verified(conv_pack, remembered, only_backends=["onnxruntime"])
    report = read_parity(conv_pack.folder)
    assert report is not None
    assert report.entries == tuple(one.parity for one in found.results)
    assert report.reference.startswith("torch ")
    assert report.clips == found.clips


def test_a_report_written_before_these_figures_is_read(conv_pack: Any, remembered: Path) -> None:
    path = conv_pack.folder / PARITY_FILE
    old = json.loads(path.read_text())
    for entry in old["entries"]:
        for out in entry["outputs"]:
            out.pop("window_errors", None)
            out.pop("cosine", None)
    path.write_text(json.dumps(old))
    verified(conv_pack, remembered, only_backends=["onnxruntime"], precisions=["fp32"])
    report = read_parity(conv_pack.folder)
    assert report is not None
    assert len(report.entries) == len(old["entries"])


def test_without_the_model_the_packs_own_graphs_are_the_reference_and_it_says_so(
    conv_pack: Any, tmp_path: Path
) -> None:
    before = read_parity(conv_pack.folder)
    found = verified(conv_pack, tmp_path)
    assert found.reference.startswith(FALLBACK)
    assert found.no_torch == "it does not say what it was exported from"
    assert "torch" not in {one.backend for one in found.results}
    assert all(one.parity is not None and one.parity.reference == FALLBACK for one in found.results)
    assert "this is not PyTorch" in printed(found)
    assert "this is not PyTorch" in html_report(found, datetime.now(UTC))
    after = read_parity(conv_pack.folder)
    # A comparison with the model itself says more, and stays.
    assert before is not None and after is not None
    assert {entry.reference for entry in after.entries if entry.precision == "fp32"} == {None}


def test_a_pack_from_elsewhere_names_nothing_that_is_run(conv_pack: Any, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\ndef make():\n    Path({str(marker)!r}).touch()\n")
    source = PackSource(model="evil:make", weights="weights.safetensors")
    write_manifest(conv_pack.folder, read_manifest(conv_pack.folder).model_copy(update={"source": source}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(str(tmp_path))
        found = verified(conv_pack, tmp_path / "cache", only_backends=["onnxruntime"])
    assert found.no_torch == "evil:make was exported on another machine"
    assert not marker.exists()


def test_a_model_that_is_not_the_packs(conv_pack: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"pack conv was not exported from base: the sha256 of its weights begins"):
        verified(conv_pack, tmp_path, source=Note(model="base"))


def test_a_backend_that_was_asked_for_and_cannot_run(conv_pack: Any, tmp_path: Path) -> None:
    for backend, precision, says in (
        ("onnxruntime", "bf16", "onnxruntime runs fp32 or int8 on device cpu, not bf16"),
        ("torch", "fp32", "torch has no module of graph small: it does not say what it was exported from"),
        ("tvm", "fp32", "no backend 'tvm'; choose among"),
        ("torch", "fp8", "no precision 'fp8'; choose among"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            verified(conv_pack, tmp_path, only_backends=[backend], precisions=[precision])


def test_over_the_bound_is_a_problem_with_its_node(conv_pack: Any, remembered: Path) -> None:
    broken(conv_pack.folder, 2.0)
    manifest = read_manifest(conv_pack.folder)
    remember(Note(model="own:factory"), manifest, remembered)
    found = verified(conv_pack, remembered, only_backends=["onnxruntime"], bisect=True)
    (line,) = found.problems
    assert line.startswith("pack conv: graph small on onnxruntime fp32: output logits is off by ")
    assert "the bound is 0.001; the first node to depart is node_linear (Gemm): its output logits is off by" in line
    (one,) = found.results
    assert one.departure is not None and one.departure.op_type == "Gemm"
    report = read_parity(conv_pack.folder)
    assert report is not None
    entry = report.entry(manifest.graph("small"), "onnxruntime", "fp32")
    assert entry is not None and not entry.passed


def test_answers_that_are_no_numbers_are_over_any_bound(conv_pack: Any, remembered: Path) -> None:
    broken(conv_pack.folder, float("nan"))
    remember(Note(model="own:factory"), read_manifest(conv_pack.folder), remembered)
    found = verified(conv_pack, remembered, only_backends=["onnxruntime"], bisect=True)
    (line,) = found.problems
    assert line.startswith("pack conv: graph small: output logits holds NaN or infinity on onnxruntime fp32")
    assert "the first node to depart is node_linear (Gemm)" in line
    assert "fails" in printed(found)


@pytest.mark.skipif("openvino" not in backends.installed(), reason="no openvino")
def test_a_cached_engine_of_another_version_is_not_used(
    conv_pack: Any, remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> int:
        found = verified(conv_pack, remembered, only_backends=["openvino"], precisions=["fp32"])
        assert found.problems == []
        return len(list_cache(remembered / ENGINES_FOLDER))

    assert (run(), run()) == (1, 1)
    monkeypatch.setattr("engines.openvino_engine.machine_id", lambda: "another machine")
    assert run() == 2
    for entry in list_cache(remembered / ENGINES_FOLDER):
        entry.path.write_bytes(entry.path.read_bytes()[:-100])
    assert run() == 2


def test_a_note_survives_and_holds_absolute_paths(conv_pack: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    note = note_of("net.onnx", ExportOptions(describe=Path("net.yaml")))
    source = source_of(note)
    assert (source.model, source.weights, source.describe) == ("net.onnx", None, "net.yaml")
    assert str(tmp_path) not in source.model_dump_json()
    assert note.model == str(tmp_path / "net.onnx")
    manifest = read_manifest(conv_pack.folder).model_copy(update={"source": source})
    remember(note, manifest, tmp_path / "cache")
    assert recall(manifest, tmp_path / "cache") == note
    assert recall(manifest.model_copy(update={"checkpoint_sha256": "1" * 64}), tmp_path / "cache") is None
    assert recall(manifest, None) is None


def test_a_pack_says_what_it_was_exported_from(conv_pack: Any, tmp_path: Path) -> None:
    manifest = read_manifest(conv_pack.folder)
    graph = GraphToExport(
        "small", conv_pack.module, {"frames": torch.zeros(2, 1, 32, 32, 3, dtype=torch.uint8)}, ("logits", "mask")
    )
    pack = PackToWrite("conv", "1", "0" * 64, (graph,), manifest.branches, source=PackSource(model="r3d_18"))
    assert write_pack(pack, tmp_path / "pack", clips=None).source == PackSource(model="r3d_18")
    assert read_manifest(tmp_path / "pack").source == PackSource(model="r3d_18")


def printed(found: Verification) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in terminal_tables(found):
        console.print(part)
    return console.export_text()


class _Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_needs_nothing_else(conv_pack: Any, tmp_path: Path) -> None:
    found = verified(conv_pack, tmp_path)
    manifest = found.manifest.model_copy(update={"version": "<script>alert(1)</script>"})
    text = html_report(replace(found, manifest=manifest, not_run=("a & <b>",)), datetime(2026, 1, 2, tzinfo=UTC))
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert "url(" not in text and "@import" not in text
    assert "a &amp; &lt;b&gt;" in text
    assert "2026-01-02" in text
