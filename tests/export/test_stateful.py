"""Trained causal models as stateful packs: what is written, its parity, and 1,000 frames against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.manifest import Manifest, Mode
from engines.open import LoadedPack, open_pack
from engines.parity import read_parity
from export.adapters.checkpoint import checkpoint_pack
from export.adapters.common import ExportOptions
from export.build import ExportError, reference, write_pack
from export.model import read_model
from export.parity import Trial
from models.checkpoint import save_model
from models.network import FusionModel, build_model
from models.types import Inputs
from stream.memory import SourceMemory
from stream.samples import HostPictures
from stream.stepping import Stepper
from stream.types import ClipWindow
from tests.export.stateful import FRAMES, HEADS, SIZE, Whole, clip_file, scenes, small_model, small_pack
from tests.stream.filmed import film

HOP = 2
Answers = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def model() -> FusionModel:
    return small_model()[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Path]:
    """The pack with a parity report, and the clip that it was measured on."""
    folder = tmp_path_factory.mktemp("stateful")
    clip = clip_file(folder)
    return folder / "pack", write_pack(small_pack()[0], folder / "pack", clips=[clip]), clip


@pytest.fixture
def pack(written: tuple[Path, Manifest, Path]) -> Iterator[LoadedPack]:
    loaded = open_pack(written[0], backend="onnxruntime")
    yield loaded
    loaded.close()


def test_what_is_written(written: tuple[Path, Manifest, Path]) -> None:
    _, manifest, _ = written
    (branch,) = manifest.branches
    assert (branch.mode, branch.window_ns, branch.hop_ns) == (Mode.STATEFUL, 2_000_000_000, 500_000_000)
    (graph,) = manifest.graphs
    inputs = {tensor.name: tensor.shape for tensor in graph.inputs}
    assert inputs["frames"] == ("batch", HOP, SIZE, SIZE, 3) and inputs["frame_mask"] == ("batch", HOP)
    assert inputs["past_2"] == ("batch", 32, 4, 16)
    names = ["weight", "averages", "past_1", "past_2"]
    assert [(state.input, state.output) for state in branch.states] == [(name, f"next_{name}") for name in names]
    assert [head.output for head in branch.heads] == ["act", "place"]


def test_parity_is_measured_hop_by_hop(written: tuple[Path, Manifest, Path]) -> None:
    report = read_parity(written[0])
    assert report is not None
    exact = {entry.backend: entry for entry in report.entries if entry.precision == "fp32"}
    assert {"onnxruntime", "openvino"} <= exact.keys()
    for entry in exact.values():
        assert entry.passed and [out.tensor for out in entry.outputs] == ["act", "place"]
        # Three windows of four hops, once as they are and once with half the frames missing.
        assert entry.samples == 2 * 3 * 4
        assert 0 < entry.max_abs_error < 1e-4


def test_an_engine_that_forgets_is_found_out(written: tuple[Path, Manifest, Path], pack: LoadedPack) -> None:
    folder, manifest, clip = written
    references = {graph.name: reference(graph) for graph in small_pack()[0].graphs}
    trial = Trial.on_clips(folder, manifest, references, [clip], 1)
    (entry,) = trial.measure_engines(pack.engines, "1")
    assert entry.passed
    (spoiled,) = trial.measure_engines({name: _Forgetful(engine) for name, engine in pack.engines.items()}, "1")
    assert not spoiled.passed


class _Forgetful:
    """An engine whose states die out."""

    def __init__(self, engine: object) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def infer(self, inputs: Answers) -> Answers:
        outputs = self._engine.infer(inputs)  # type: ignore[attr-defined]
        return {name: value * 0.5 if name.startswith("next_past") else value for name, value in outputs.items()}


def test_calibration_sees_states_that_are_not_empty(written: tuple[Path, Manifest, Path]) -> None:
    folder, manifest, clip = written
    references = {graph.name: reference(graph) for graph in small_pack()[0].graphs}
    batches = Trial.on_clips(folder, manifest, references, [clip], 1).inputs()["window"]
    assert len(batches) == 24
    assert [bool(batch["past_1"].any()) for batch in batches] == 2 * [False, *[True] * 11]


def outputs_of(
    stepper: Stepper, batch: list[ClipWindow]
) -> Iterator[tuple[ClipWindow, dict[str, NDArray[np.float32]]]]:
    answers = stepper.infer(tuple(batch), {})
    for row, window in enumerate(batch):
        yield window, {name: values[row] for name, values in answers.items()}


def stepper_of(pack: LoadedPack, memory: SourceMemory) -> Stepper:
    (branch,) = pack.manifest.branches
    engine = pack.engines[branch.graph]
    assert branch.video is not None
    return Stepper(engine, branch, branch.video, memory.states(branch, engine.spec.inputs), HostPictures())


def worst(got: Answers, wanted: Answers) -> float:
    assert got.keys() == wanted.keys()
    return max(float(np.abs(got[name] - wanted[name]).max()) for name in wanted)


def test_a_thousand_frames_of_eight_sources_equal_pytorch(pack: LoadedPack, model: FusionModel) -> None:
    """Logits and embeddings to 1e-4; sources drop windows and reconnect, batches change in order and size."""
    (branch,) = pack.manifest.branches
    random = np.random.default_rng(3)
    films = {(n, 0): scenes(1000 if n < 6 else 500, seed=n) for n in range(8)}
    films |= {(n, 1): scenes(500, seed=10 + n) for n in (6, 7)}
    whole = {key: Whole(model, images) for key, images in films.items()}
    queues: list[list[ClipWindow]] = [[], [], [], [], [], [], [], []]
    for (n, epoch), images in films.items():
        queues[n] += film(branch, images, source=f"cam{n}", epoch=epoch)
    # Source 5 drops some of its windows, never more in a row than the next one reaches back over.
    queues[5] = [w for w in queues[5] if w.key.index % 7 not in (3, 4, 5)]
    memory = SourceMemory()
    stepper = stepper_of(pack, memory)
    error, count, spread = 0.0, 0, []
    while any(queues):
        ready = [queue for queue in queues if queue]
        batch = [ready[n].pop(0) for n in random.permutation(len(ready))]
        for window, got in outputs_of(stepper, batch):
            key = (int(window.key.source_id[3:]), window.key.epoch)
            wanted = whole[key].after(FRAMES + window.key.index * HOP)
            error, count = max(error, worst(got, wanted)), count + 1
            spread.append(wanted["act"])
    assert count == 5 * 497 + 2 * 2 * 247 + 284
    assert error < 1e-4
    assert float(np.std(spread, axis=0).min()) > 0.01, "the answers should not all be the same"
    assert memory.restarted == memory.evicted == 0


def test_with_room_for_fewer_sources_it_begins_anew(pack: LoadedPack, model: FusionModel) -> None:
    (branch,) = pack.manifest.branches
    films = [scenes(40, seed=20 + n) for n in range(3)]
    queues = [film(branch, images, source=f"cam{n}") for n, images in enumerate(films)]
    memory = SourceMemory(max_state_bytes=1)
    stepper = stepper_of(pack, memory)
    for row in zip(*queues, strict=True):
        for window in row:
            ((_, got),) = outputs_of(stepper, [window])
            first = window.key.index * HOP
            images = films[int(window.key.source_id[3:])][first : first + FRAMES]
            assert worst(got, Whole(model, images).after(FRAMES)) < 1e-4
    assert memory.restarted == 3 * 16 and memory.evicted == 3 * 17 - 1


def test_a_first_window_is_the_model_itself(pack: LoadedPack, model: FusionModel) -> None:
    """Frames that are missing too: held as the network itself holds them."""
    (branch,) = pack.manifest.branches
    images = scenes(FRAMES, seed=40)
    # Two in a row: for the first of them the frame before is not too old.
    (window,) = film(branch, images, lost=(0, 1, 4, 5, 6))
    mask = torch.from_numpy((window.frame_pts_ns[:, -1] >= 0).astype(np.float32))[None]
    assert mask[0].tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    shown = images.copy()
    shown[4] = images[3]
    with torch.inference_mode():
        wanted = model(Inputs(video=torch.from_numpy(shown)[None], video_mask=mask)).logits
    ((_, got),) = outputs_of(stepper_of(pack, SourceMemory()), [window])
    assert worst(got, {head.name: wanted[head.name][0].numpy() for head in HEADS}) < 1e-4


def test_sound_and_its_absence() -> None:
    """The graph in PyTorch: answers with each modality hidden, and with none to hear, are those of the model."""
    pack, model = small_pack(audio=True)
    (graph,) = pack.graphs
    run = reference(graph)
    frames = np.stack([scenes(FRAMES, seed=n) for n in (50, 51)])
    audio = np.random.default_rng(6).uniform(-0.5, 0.5, (2, 32_000)).astype(np.float32)
    states = {name: value.numpy() for name, value in graph.example.items() if name not in _MEDIA}  # type: ignore[union-attr]
    heard = np.array([1, 0], np.float32)
    for hop in range(FRAMES // HOP):
        media = {"frames": frames[:, hop * HOP :][:, :HOP], "frame_mask": np.ones((2, HOP), np.float32)}
        outputs = run({**media, "audio": audio, "audio_mask": heard, **states})
        states = {name: np.array(outputs[f"next_{name}"]) for name in states}
    inputs = Inputs(
        video=torch.from_numpy(frames),
        video_mask=torch.ones(2, FRAMES),
        audio=torch.from_numpy(audio),
        audio_mask=torch.from_numpy(heard),
    )
    with torch.inference_mode():
        both, blind, deaf = model(inputs), model.without(inputs, "video"), model.without(inputs, "audio")
    for name, wanted in (("act", both), ("act_without_video", blind), ("act_without_audio", deaf)):
        assert np.abs(outputs[name] - wanted.logits["act"].numpy()).max() < 1e-4, name
    assert np.abs(outputs["act"] - outputs["act_without_video"]).max() > 1e-3
    assert np.abs(outputs["act"] - outputs["act_without_audio"])[0].max() > 1e-3


_MEDIA = ("frames", "frame_mask", "audio", "audio_mask")


def test_a_checkpoint_is_run_as_is_asked_for(tmp_path: Path) -> None:
    _, card = small_model()
    # What the configuration says, not the small network that stands in for it elsewhere.
    whole_model = build_model(card.model, pretrained=False).eval()
    save_model(tmp_path / "run", whole_model, card, None)
    stateful = checkpoint_pack(tmp_path / "run", ExportOptions(mode=Mode.STATEFUL))
    assert stateful.branches[0].mode is Mode.STATEFUL and len(stateful.branches[0].states) == 2 + 14
    for options in (ExportOptions(), ExportOptions(mode=Mode.CLIP)):
        clip = checkpoint_pack(tmp_path / "run", options)
        assert clip.branches[0].mode is Mode.CLIP and clip.branches[0].states == ()
    with pytest.raises(ExportError, match="mode staged needs a model with backbone: frame"):
        checkpoint_pack(tmp_path / "run", ExportOptions(mode=Mode.STAGED))
    with pytest.raises(ExportError, match=r"only models of `sightwire train` can be stateful"):
        read_model("torchvision:r3d_18", ExportOptions(mode=Mode.STATEFUL))
    save_model(tmp_path / "odd", whole_model, card.model_copy(update={"hop_s": 0.75}), None)
    with pytest.raises(ExportError, match="a window of whole hops; train it with other settings"):
        checkpoint_pack(tmp_path / "odd", ExportOptions(mode=Mode.STATEFUL))
