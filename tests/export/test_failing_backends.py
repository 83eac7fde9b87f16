"""A backend that cannot build or run a graph is a row of the report, and the others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engines import backends
from engines.errors import GraphLoadError, InferenceError, ParityFailed
from engines.manifest import PARITY_FILE, GraphSpec, read_manifest
from engines.open import open_pack
from engines.parity import GraphParity, read_parity
from engines.tinypack import REFERENCES, write_tiny_pack
from engines.types import Array, Engine, Tensors
from export.compile import compile_pack
from export.parity import run_parity
from export.verify import verify_pack
from export.verify_report import html_report, terminal_tables

pytestmark = pytest.mark.skipif("openvino" not in backends.installed(), reason="no openvino")
REFUSED = "pack tiny: openvino 1 cannot compile graph watch_encoder; export the pack again"
FAILED = "pack tiny: graph watch_encoder: output features holds NaN or infinity on openvino fp32; check the input"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_pack(tmp_path / "tiny")
    return tmp_path / "tiny"


class Fails:
    """An engine that loads and cannot run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.spec = engine.spec
        self.close = engine.close

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        raise InferenceError(FAILED)


Break = Callable[..., None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Lets graphs fail on backends, as they are loaded or as they are run."""
    load, compile_graph = backends.load, backends.compile_graph

    def set_up(how: str, graphs: tuple[str, ...] = ("watch_encoder",), on: tuple[str, ...] = ("openvino",)) -> None:
        def loaded(path: Path, pack: str, graph: GraphSpec, backend: str, options: Any) -> Any:
            if backend not in on or graph.name not in graphs:
                return load(path, pack, graph, backend, options)
            if how == "build":
                raise GraphLoadError(REFUSED)
            return Fails(load(path, pack, graph, backend, options))

        def compiled(path: Path, pack: str, graph: GraphSpec, backend: str, options: Any) -> Any:
            if how == "build" and backend in on and graph.name in graphs:
                raise GraphLoadError(REFUSED)
            return compile_graph(path, pack, graph, backend, options)

        monkeypatch.setattr(backends, "load", loaded)
        monkeypatch.setattr(backends, "compile_graph", compiled)

    return set_up


def by_engine(entries: tuple[GraphParity, ...]) -> dict[tuple[str, str], GraphParity]:
    return {(entry.graph, entry.backend): entry for entry in entries}


@pytest.mark.parametrize(("how", "cause"), [("build", REFUSED), ("run", FAILED)])
def test_a_backend_that_fails_is_a_row_and_the_others_are_measured(
    tiny: Path, film: Path, broken: Break, how: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tiny / PARITY_FILE).unlink()
    broken(how)
    with caplog.at_level(logging.WARNING):
        run_parity(tiny, REFERENCES, [film], batch_sizes=())
    report = read_parity(tiny)
    assert report is not None
    found = by_engine(report.entries)
    row = found["watch_encoder", "openvino"]
    assert not row.passed and row.problem == cause and row.outputs == ()
    assert f"watch_encoder on openvino fp32 failed: {cause}" in caplog.text
    # Its window graph is tried on the reference's features, the other branch and the other backend as ever.
    names = [graph.name for graph in read_manifest(tiny).graphs]
    assert found.keys() == {(name, backend) for name in names for backend in ("onnxruntime", "openvino")}
    assert [key for key, entry in found.items() if not entry.passed] == [("watch_encoder", "openvino")]
    with pytest.raises(ParityFailed, match="could not be compared with PyTorch: pack tiny"):
        open_pack(tiny, backend="openvino")
    opened = open_pack(tiny, cache=tiny)
    assert opened.engines["watch_encoder"].spec.backend == "onnxruntime"
    opened.close()


@pytest.mark.parametrize(("how", "error"), [("build", GraphLoadError), ("run", InferenceError)])
def test_a_graph_that_no_backend_runs_is_an_error(
    tiny: Path, film: Path, broken: Break, how: str, error: type[Exception]
) -> None:
    (tiny / PARITY_FILE).unlink()
    broken(how, on=("openvino", "onnxruntime"))
    with pytest.raises(error, match="watch_encoder"):
        run_parity(tiny, REFERENCES, [film], batch_sizes=())
    assert not (tiny / PARITY_FILE).exists()


@pytest.mark.parametrize(("how", "cause"), [("build", REFUSED), ("run", FAILED)])
def test_verify_shows_what_failed_beside_the_rest(
    tiny: Path, film: Path, broken: Break, how: str, cause: str, tmp_path: Path
) -> None:
    broken(how)
    found = verify_pack(tiny, clips=[film], cache=tmp_path / "cache", precisions=["fp32"], batch_sizes=(1,))
    assert found.problems == [cause]
    assert len(found.results) == 6 and [one.window for one in found.results if one.problem] == (
        [None] if how == "build" else [0]
    )
    assert list(terminal_tables(found)) and html_report(found, datetime.now(UTC)).count(cause) == 1
    report = read_parity(tiny)
    assert report is not None
    assert by_engine(report.entries)["watch_encoder", "openvino"].problem == cause


def test_auto_compiles_for_those_that_can(
    tiny: Path, film: Path, broken: Break, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken("build")
    with caplog.at_level(logging.WARNING):
        results = compile_pack(tiny, "auto", clips=[film], references=REFERENCES, cache=tmp_path / "cache")
    assert {one.backend for one in results} == {"onnxruntime"}
    assert f"left out: {REFUSED}" in caplog.text
    broken("build", on=("openvino", "onnxruntime"))
    with pytest.raises(GraphLoadError, match="watch_encoder"):
        compile_pack(tiny, "auto", clips=[film], references=REFERENCES, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [{"outputs": (), "samples": 0}, {"problem": "it burns"}, {"samples": 0}],
    ids=["neither figures nor problem", "passed with a problem", "no samples"],
)
def test_a_row_has_figures_or_a_problem(tiny: Path, change: dict[str, Any]) -> None:
    report = read_parity(tiny)
    assert report is not None
    with pytest.raises(ValueError, match="an entry with"):
        GraphParity.model_validate(report.entries[0].model_dump() | change)
