"""BlazePose as a teacher of joints: `python -m models.basepack.pose_teacher WHEEL DATA`.

BlazePose (Bazarevsky et al., arXiv:2006.10204) finds a person by detector, then 33 landmarks in a square turned upright
around it. Both networks lie in the wheel of ``mediapipe`` 0.10.14 (Apache-2.0), which is read as an archive:
``pip download --no-deps mediapipe==0.10.14``. They are needed to make ``joints.safetensors`` and for nothing else.
"""

from __future__ import annotations

import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch.nn import functional as F

from models.basepack import shape, tables
from models.basepack.joint_fit import LEVELS, TAUGHT_FILE, name_of
from models.basepack.joints import JOINTS
from models.basepack.retrieval_data import CAPTIONED
from models.errors import DataError, ModelError, WeightsError
from models.media import Images, read_clip, sample_pairs

Floats = NDArray[np.floating]
DETECTOR = "mediapipe/modules/pose_detection/pose_detection.tflite"
LANDMARKS = "mediapipe/modules/pose_landmark/pose_landmark_full.tflite"
DETECTOR_SIDE, LANDMARK_SIDE = 224, 256
DETECTED, PRESENT, VISIBLE = 0.35, 0.5, 0.3
"""Least score of a detection, of a pose, and of a landmark."""
MARGIN = 1.25
"""Of the square around a person, against the circle that the detector draws."""
SAME = 0.3
"""Overlap over which detections are one and are averaged by score."""
SIDES = ((0,), (11, 12), (23, 24), (25, 26), (27, 28))
"""Landmarks that make each of ``JOINTS``."""
_HIPS, _SIZE = 33, 34
"""Two landmarks that tell where to look in the next frame."""


@dataclass(frozen=True, slots=True)
class Pose:
    """A person's landmarks."""

    places: Floats
    """float32 ``[39, 2]``, x then y in pixels."""
    visible: Floats
    """float32 ``[39]`` in 0..1."""


class PoseTeacher:
    """Both networks."""

    def __init__(self, wheel: Path) -> None:
        """Raises ``WeightsError`` where the networks cannot be run."""
        try:
            from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError:
            raise WeightsError(
                "the teacher of joints needs the package ai-edge-litert; run `pip install ai-edge-litert`"
            ) from None
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = [archive.read(name) for name in (DETECTOR, LANDMARKS)]
            self._networks = [Interpreter(model_content=network, num_threads=1) for network in content]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{wheel} is not the wheel of mediapipe 0.10.14 ({error}); download it again") from error
        for network in self._networks:
            network.allocate_tensors()
        self._anchors = anchors()

    def pose(self, image: Images, before: Pose | None) -> Pose | None:
        """The pose of the person seen best, uint8 ``[H, W, 3]``; where nobody is detected, of who was there before."""
        found = self._detected(image)
        if found is None and before is not None:
            found = before.places[_HIPS], before.places[_SIZE]
        return None if found is None else self._landmarks(image, *found)

    def _run(self, network: int, picture: Floats) -> list[Floats]:
        interpreter = self._networks[network]
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], picture[None])
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"])[0] for output in interpreter.get_output_details()]

    def _detected(self, image: Images) -> tuple[Floats, Floats] | None:
        """Hips and a point on the circle around the person, in pixels."""
        height, width = image.shape[:2]
        side = max(height, width)
        centre = np.array([width, height], np.float32) / 2
        raw, logits = self._run(0, square(image, centre, side, 0.0, DETECTOR_SIDE) / 127.5 - 1)
        score = 1 / (1 + np.exp(-np.clip(logits[:, 0], -80, 80)))
        best = int(score.argmax())
        if score[best] < DETECTED:
            return None
        points = raw.reshape(-1, 6, 2) / DETECTOR_SIDE
        middle = points[:, 0] + self._anchors
        boxes = np.concatenate([middle - points[:, 1] / 2, middle + points[:, 1] / 2], axis=1)
        same = (score >= DETECTED) & (overlap(boxes[best], boxes) > SAME)
        keys = (points[same, 2:4] + self._anchors[same, None]) * score[same, None, None]
        hips, edge = keys.sum(axis=0) / score[same].sum() * side + centre - side / 2
        return hips, edge

    def _landmarks(self, image: Images, hips: Floats, edge: Floats) -> Pose | None:
        across, down = (edge - hips).tolist()
        side, angle = 2 * MARGIN * math.hypot(across, down), math.pi / 2 - math.atan2(-down, across)
        if side < 4:
            return None
        raw, present, *_ = self._run(1, square(image, hips, side, angle, LANDMARK_SIDE) / 255)
        if float(present.reshape(-1)[0]) <= PRESENT:
            return None
        marks = raw.reshape(39, 5)
        places = (marks[:, :2] / LANDMARK_SIDE - 0.5) @ turn(angle).T * side + hips
        return Pose(places.astype(np.float32), 1 / (1 + np.exp(-np.clip(marks[:, 3], -80, 80))))


def anchors() -> Floats:
    """Middles of the detector's anchors, float32 ``[2254, 2]``: two a cell at strides 8 and 16, six at 32."""
    found = []
    for cells, each in ((28, 2), (14, 2), (7, 6)):
        middle = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        grid = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2)
        found.append(np.repeat(grid, each, axis=0))
    return np.concatenate(found)


def turn(angle: float) -> Floats:
    """float32 ``[2, 2]``."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]], np.float32)


def square(image: Images, centre: Floats, side: float, angle: float, size: int) -> Floats:
    """A turned square of a picture, scaled to float32 ``[size, size, 3]``; black outside."""
    height, width = image.shape[:2]
    at = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    places = np.stack(np.meshgrid(at, at), axis=-1) @ turn(angle).T * side + centre
    grid = torch.from_numpy(places / np.array([width, height], np.float32) * 2 - 1).float()
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    seen: Floats = F.grid_sample(pixels[None], grid[None], align_corners=False)[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(seen)


def overlap(box: Floats, boxes: Floats) -> Floats:
    """Intersection over union of corners ``[4]`` and ``[N, 4]``."""
    inner = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = inner.clip(0).prod(axis=1)
    both = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    result: Floats = shared / np.maximum(both, 1e-9)
    return result


def joints(recording: tables.Recording, teacher: PoseTeacher) -> NDArray[np.uint8]:
    """uint8 ``[S, 5, 2]`` of a recording's samples, as ``joints.safetensors`` holds them. Raises ``DataError``."""
    try:
        with av.open(str(recording.path)) as container:
            width, height = container.streams.video[0].width, container.streams.video[0].height
    except (OSError, IndexError) as error:
        raise DataError(f"{recording.path} cannot be read ({error}); replace the file") from error
    clip = read_clip(recording.path, width, height, seconds=recording.seconds)
    _, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS)
    out = np.zeros((len(pairs), len(JOINTS), 2), np.uint8)
    before: Pose | None = None
    for sample, frame in enumerate(pairs[:, 1]):
        if frame < 0:
            continue
        before = teacher.pose(clip.images[frame], before)
        if before is not None:
            out[sample] = stored(before, width, height)
    return out


def stored(pose: Pose, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 ``[5, 2]``; zeros for joints that are hidden or outside the picture."""
    places = np.stack([pose.places[list(sides)].mean(axis=0) for sides in SIDES]) / np.array([width, height])
    visible = np.array([pose.visible[list(sides)].min() > VISIBLE for sides in SIDES])
    seen = visible & ((places > 0) & (places < 1)).all(axis=1)
    return np.where(seen[:, None], np.clip(np.round(1 + places * (LEVELS - 1)), 1, LEVELS), 0).astype(np.uint8)


def main() -> None:
    """Write ``joints.safetensors`` from the wheel and the data named on the command line."""
    try:
        wheel, data = (Path(argument) for argument in sys.argv[1:])
        teacher = PoseTeacher(wheel)
        recordings = [item for item in tables.recordings(data) if item.dataset in CAPTIONED]
        save_file({name_of(item): joints(item, teacher) for item in recordings}, TAUGHT_FILE)
    except ValueError:
        sys.exit("give the wheel of mediapipe and the folder of the data")
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
