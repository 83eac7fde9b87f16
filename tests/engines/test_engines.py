"""Every real backend runs the tiny pack's rules, and says clearly what is wrong with bad inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.backends import EngineOptions, load
from engines.checks import failed
from engines.errors import InferenceError
from engines.manifest import Manifest, read_manifest
from engines.measure import random_batch
from engines.tinypack import FEATURES, RATE, REFERENCES, SAMPLES, SIZE
from engines.types import Array, Engine, EngineSpec


@pytest.fixture(scope="module")
def manifest(tiny_master: Path) -> Manifest:
    return read_manifest(tiny_master)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engines(request: pytest.FixtureRequest, tiny_master: Path, manifest: Manifest) -> dict[str, Engine]:
    pytest.importorskip(request.param)
    return {
        graph.name: load(tiny_master / graph.file, "tiny", graph, request.param, EngineOptions())
        for graph in manifest.graphs
    }


def window(**changed: Array) -> dict[str, Array]:
    inputs = {
        "features": np.full((1, SAMPLES, FEATURES), 0.5, np.float32),
        "frame_mask": np.ones((1, SAMPLES), np.float32),
        "audio": np.zeros((1, 2 * RATE), np.float32),
        "audio_mask": np.ones(1, np.float32),
    }
    return inputs | changed


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_outputs_follow_the_rule_at_any_batch_size(engines: dict[str, Engine], manifest: Manifest, batch: int) -> None:
    for graph in manifest.graphs:
        inputs = random_batch(graph, batch, seed=batch)
        got, want = engines[graph.name].infer(inputs), REFERENCES[graph.name](inputs)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype
            np.testing.assert_allclose(got[name], want[name], atol=1e-4)


def test_outputs_stay_when_the_engine_runs_again(engines: dict[str, Engine], manifest: Manifest) -> None:
    graph = manifest.graph("watch_encoder")
    first = engines[graph.name].infer(random_batch(graph, 2, seed=1))["features"]
    kept = first.copy()
    engines[graph.name].infer(random_batch(graph, 2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_labels_answer_to_picture_and_sound(engines: dict[str, Engine]) -> None:
    tone = np.sin(np.arange(2 * RATE) * 0.2, dtype=np.float32)[None] * np.float32(0.5)
    bright = np.tile(np.array([0.9, 0.3], np.float32), (1, SAMPLES, 1))
    out = engines["watch_window"].infer(window(features=bright, audio=tone))
    assert (out["action_logits"] > 0).all()
    assert out["action_without_video"][0].tolist()[0] < 0 < out["action_without_video"][0].tolist()[2]
    assert out["action_without_audio"][0].tolist()[2] < 0 < out["action_without_audio"][0].tolist()[0]
    assert out["class_logits"].argmax() == 0
    assert engines["watch_window"].infer(window())["class_logits"].argmax() == 1


def test_half_the_audio_is_as_loud_as_all_of_it(engines: dict[str, Engine]) -> None:
    tone = np.full((1, 2 * RATE), 0.2, np.float32)
    half = tone.copy()
    half[:, RATE:] = 0
    whole = engines["watch_window"].infer(window(audio=tone))["action_logits"]
    part = engines["watch_window"].infer(window(audio=half, audio_mask=np.full(1, 0.5, np.float32)))["action_logits"]
    np.testing.assert_allclose(part, whole, atol=1e-3)


def test_non_contiguous_inputs_are_read_right(engines: dict[str, Engine], manifest: Manifest) -> None:
    inputs = random_batch(manifest.graph("watch_encoder"), 4)
    flipped = {"frames": inputs["frames"][:, :, ::-1, :, ::-1]}
    want = REFERENCES["watch_encoder"](flipped)["features"]
    np.testing.assert_allclose(engines["watch_encoder"].infer(flipped)["features"], want, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"audio": np.zeros((1, RATE), np.float32)},
            f"input audio is float32[1, {RATE}], must be float32[1, {2 * RATE}]",
        ),
        ({"audio": np.zeros((1, 2 * RATE), np.float64)}, "input audio is float64"),
        ({"audio_mask": np.ones(2, np.float32)}, "input audio_mask is float32[2], must be float32[1]"),
        ({"frame_mask": np.ones(SAMPLES, np.float32)}, f"input frame_mask is float32[{SAMPLES}]"),
        ({"colour": np.ones(1, np.float32)}, "needs inputs"),
    ],
)
def test_inputs_that_do_not_fit_name_graph_and_tensor(
    engines: dict[str, Engine], changed: dict[str, Array], says: str
) -> None:
    with pytest.raises(InferenceError) as caught:
        engines["watch_window"].infer(window(**changed))
    assert "pack tiny: graph watch_window" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_is_refused(engines: dict[str, Engine]) -> None:
    with pytest.raises(InferenceError, match="frames is uint8"):
        engines["watch_encoder"].infer({"frames": np.zeros((0, 2, SIZE, SIZE, 3), np.uint8)})


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_an_error(engines: dict[str, Engine], poison: float) -> None:
    features = np.full((1, SAMPLES, FEATURES), poison, np.float32)
    with pytest.raises(InferenceError, match=r"graph watch_window: output action_\w+ holds NaN or infinity"):
        engines["watch_window"].infer(window(features=features))


def test_warmup_and_close(tiny_master: Path, manifest: Manifest, engines: dict[str, Engine]) -> None:
    backend = engines["watch_encoder"].spec.backend
    graph = manifest.graph("watch_encoder")
    engine = load(tiny_master / graph.file, "tiny", graph, backend, EngineOptions())
    engine.warmup([1, 2])
    engine.close()
    engine.close()
    with pytest.raises(InferenceError, match="graph watch_encoder is closed"):
        engine.infer(random_batch(graph, 1))


_STARVED = """
import resource, sys
from pathlib import Path
from engines import backends
from engines.checks import failed
from engines.errors import InferenceError
from engines.manifest import read_manifest
from engines.measure import random_batch
folder, backend = Path(sys.argv[1]), sys.argv[2]
graph = read_manifest(folder).graph("watch_encoder")
engine = backends.load(folder / graph.file, "tiny", graph, backend, backends.EngineOptions())
engine.infer(random_batch(graph, 1))
large = random_batch(graph, 8192)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10_000_000, resource.RLIM_INFINITY))
try:
    engine.infer(large)
except InferenceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
engine.infer(random_batch(graph, 1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_out_of_memory_is_said_and_the_engine_goes_on(tiny_master: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STARVED, str(tiny_master), "onnxruntime"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    wanted = "pack tiny: graph watch_encoder: onnxruntime is out of memory on cpu; use smaller batches"
    assert done.stdout.strip() == wanted


@pytest.mark.parametrize(
    "cause", ["std::bad_alloc", "CUDA out of memory. Tried to allocate 2 GiB", "Failed to allocate"]
)
def test_every_way_to_say_out_of_memory_is_understood(manifest: Manifest, cause: str) -> None:
    graph = manifest.graph("watch_encoder")
    spec = EngineSpec("tiny", graph.name, "torch", "cuda:0", "fp32", graph.inputs, graph.outputs)
    assert "torch is out of memory on cuda:0; use smaller batches" in str(failed(spec, cause))
    assert str(failed(spec, "odd shape")) == "pack tiny: graph watch_encoder failed on torch: odd shape"


_AT_ONCE = """
import sys, threading
from pathlib import Path

from engines.backends import EngineOptions, load
from engines.manifest import read_manifest
from engines.measure import random_batch

folder, backend = Path(sys.argv[1]), sys.argv[2]
graph = read_manifest(folder).graph("watch_encoder")
engines = [load(folder / graph.file, "tiny", graph, backend, EngineOptions()) for _ in range(2)]
batch, start = random_batch(graph, 1), threading.Barrier(2)
sys.setswitchinterval(1e-6)

def run(engine):
    start.wait()
    engine.infer(batch)

threads = [threading.Thread(target=run, args=(engine,)) for engine in engines]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_first_inferences_may_be_at_once(tiny_master: Path, backend: str) -> None:
    """OpenVINO sets things up at first use, and two threads could wait there for each other for ever."""
    pytest.importorskip(backend)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _AT_ONCE, str(tiny_master), backend]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, timeout=60, check=True)
