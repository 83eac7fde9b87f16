"""The benchmark of modes runs, on tiny graphs: every figure is there, though none is worth quoting."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench import modes
from bench.common import BenchError
from bench.engines import Plan as EnginesPlan
from bench.engines import main as engines_main
from engines.manifest import Branch, Head, HeadKind, Manifest, Mode, StateSpec, VideoInput, write_manifest
from engines.tinypack import write_graph
from tests.export.stateful import small_model

SIZE = 8
PLAN = modes.Plan(ratios=(4,), size=SIZE, sources=2, rounds=2)
_HEADER = '<ir_version: 8, opset_import: ["" : 18]>'
_LEVEL = "axes = Constant <value = int64[{n}] {{{axes}}}> ()\n  x = Cast <to = 1> (frames)\n"
_MEAN = "  {to} = ReduceMean <keepdims = 0> (x, axes)\n"


def _graph(name: str, ports: str, axes: tuple[int, ...], to: str, rest: str = "") -> str:
    level = _LEVEL.format(n=len(axes), axes=", ".join(map(str, axes))) + _MEAN.format(to=to)
    return f"{_HEADER}\n{name} {ports} {{\n  {level}{rest}}}"


FRAME = f"{SIZE}, {SIZE}, 3"
CLIP = _graph("clip", f"(uint8[batch, 16, {FRAME}] frames) => (float[batch, 3] act)", (1, 2, 3), "act")
ENCODER = _graph("encoder", f"(uint8[batch, {FRAME}] frames) => (float[batch, 3] features)", (1, 2), "features")
WINDOW = f"""{_HEADER}
window (float[batch, 16, 3] features) => (float[batch, 3] act) {{
  axes = Constant <value = int64[1] {{1}}> ()
  act = ReduceMean <keepdims = 0> (features, axes)
}}"""
HOP = _graph(
    "hop",
    f"(uint8[batch, 4, {FRAME}] frames, float[batch, 3] level) => (float[batch, 3] act, float[batch, 3] next_level)",
    (1, 2, 3),
    "fresh",
    "  next_level = Add (level, fresh)\n  act = Identity (next_level)\n",
)


def pack(folder: Path, mode: Mode, graphs: dict[str, str], **branch: Any) -> None:
    folder.mkdir(parents=True)
    head = Head(name="act", kind=HeadKind.ACTION, output="act", labels=("a", "b", "c"), activation="softmax")
    manifest = Manifest(
        name="bench",
        version="1",
        checkpoint_sha256="0" * 64,
        graphs=tuple(write_graph(folder, name, text) for name, text in graphs.items()),
        branches=(
            Branch(
                name="watch",
                mode=mode,
                window_ns=2 * 10**9,
                hop_ns=5 * 10**8,
                video=VideoInput(width=SIZE, height=SIZE, fps=Fraction(modes.FPS)),
                heads=(head,),
                **branch,
            ),
        ),
    )
    write_manifest(folder, manifest)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Packs as an earlier run of the benchmark may have kept them."""
    folder = tmp_path / "kept"
    for backbone in ("frame", "stream-1"):
        name, _, scale = backbone.partition("-")
        end = f"{SIZE}-{scale}".rstrip("-")
        pack(folder / f"{name}-clip-{end}", Mode.CLIP, {"clip": CLIP}, graph="clip")
    pack(
        folder / f"frame-staged-{SIZE}",
        Mode.STAGED,
        {"encoder": ENCODER, "window": WINDOW},
        graph="window",
        encoder="encoder",
    )
    states = (StateSpec(input="level", output="next_level"),)
    pack(folder / f"stream-stateful-{SIZE}-1-4", Mode.STATEFUL, {"hop": HOP}, graph="hop", states=states)
    return folder


def test_every_mode_has_its_turn(kept: Path) -> None:
    told: list[str] = []
    found = modes.measure_modes(PLAN, kept, progress=told.append)
    assert not any(line.startswith("exporting") for line in told)
    names = {"frame_clip_ms_4", "staged_hop_ms_4", "stream_clip_ms_4", "stateful_hop_ms_4"}
    ratios = {f"{mode}_cost_ratio_4{end}" for mode in ("staged", "stateful") for end in ("", "_low", "_high")}
    assert found.keys() == names | ratios
    assert all(value > 0 for value in found.values())
    for mode in ("staged", "stateful"):
        low, middle, high = (found[f"{mode}_cost_ratio_4{end}"] for end in ("_low", "", "_high"))
        assert low <= middle <= high
    rows = {row.key: row for row in modes.as_rows(found, PLAN.ratios).rows}
    assert rows["staged_cost_ratio_4"].target and rows["stateful_cost_ratio_4"].target


def test_a_broken_pack_is_one_line(kept: Path) -> None:
    (kept / f"frame-staged-{SIZE}" / "window.onnx").write_bytes(b"")
    with pytest.raises(BenchError, match=r"pack bench: window.onnx is not the file") as caught:
        modes.measure_modes(PLAN, kept)
    assert "\n" not in str(caught.value)


def test_the_figures_of_the_benchmark_have_their_names(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = modes.measure_modes
    monkeypatch.setattr(modes, "measure_modes", lambda plan, progress: whole(plan, kept, progress=progress))
    written = tmp_path / "engines.json"
    assert engines_main(["--only", "modes", "--json", str(written)], EnginesPlan(modes=PLAN)) == 0
    said = capsys.readouterr().out
    for key in ("staged_cost_ratio_4", "stateful_cost_ratio_4"):
        assert json.loads(written.read_text())[key] > 0
        assert key in said


def test_a_network_is_exported_and_equals_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export of the benchmark itself, of a network of few blocks, under a name of a width with a dot in it."""
    monkeypatch.setattr(modes, "network", lambda backbone, plan, ratio: small_model(frames=modes.SAMPLES))
    found = modes.equality(modes.Plan(size=32, width_multiplier=0.5), frames=32, sources=2)
    figures = {row.key: row.value for row in found.rows}
    assert 0 < figures["stateful_max_error"] < 1e-4 < figures["stateful_spread"]
    assert found.notes[0].startswith("2 sources of 32 frames, 10 windows")
