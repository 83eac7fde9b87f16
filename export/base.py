"""What the base pack's manifest says: branches, heads, labels, thresholds."""

from __future__ import annotations

from fractions import Fraction

from engines.manifest import AudioInput, Branch, Head, HeadKind, Modality, Mode, Threshold, VideoInput
from models.audio import SAMPLE_RATE
from models.basepack import shape
from models.basepack.labels import ACTIONS, SCENE, SOUNDS
from models.basepack.network import Calibration

NAME = "base"
DESCRIPTION = "Actions, sounds and street scenes: EfficientNet-Lite0 on frames and their differences, log-mel CNN."
LICENCE = "Apache-2.0 code; weights trained on data for research use, see the model card"


def watch_branch(calibration: Calibration) -> Branch:
    """Actions and sounds over two seconds."""
    return Branch(
        name="watch",
        mode=Mode.STAGED,
        window_ns=shape.WATCH_WINDOW_NS,
        hop_ns=shape.WATCH_HOP_NS,
        video=VideoInput(
            width=shape.WATCH_SIZE,
            height=shape.WATCH_SIZE,
            fps=Fraction(shape.WATCH_FPS),
            lookback_ns=shape.LOOKBACK_NS,
        ),
        audio=AudioInput(sample_rate=SAMPLE_RATE),
        encoder="encoder",
        graph="window",
        heads=(
            Head(
                name="action",
                kind=HeadKind.ACTION,
                output="action",
                labels=ACTIONS,
                background=("other",),
                activation="sigmoid",
                temperature=calibration.action_temperature,
                thresholds=_thresholds(calibration, "action"),
                without=_without("action"),
            ),
            Head(
                name="class",
                kind=HeadKind.CLASS,
                output="class",
                labels=SOUNDS,
                background=("none",),
                activation="softmax",
                temperature=calibration.class_temperature,
                thresholds=_thresholds(calibration, "class"),
                without=_without("class"),
            ),
        ),
    )


def scene_branch() -> Branch:
    """What is where in the picture, once a second."""
    return Branch(
        name="scene",
        mode=Mode.CLIP,
        window_ns=shape.SCENE_WINDOW_NS,
        hop_ns=shape.SCENE_WINDOW_NS,
        video=VideoInput(width=shape.SCENE_WIDTH, height=shape.SCENE_HEIGHT, fps=Fraction(1)),
        graph="segmentation",
        heads=(Head(name="segmentation", kind=HeadKind.SEGMENTATION, output="mask", labels=SCENE),),
    )


def _thresholds(calibration: Calibration, head: str) -> dict[str, Threshold]:
    return {label: Threshold(on=on, off=off) for label, (on, off) in calibration.thresholds.get(head, {}).items()}


def _without(head: str) -> dict[Modality, str]:
    return {Modality.VIDEO: f"{head}_without_video", Modality.AUDIO: f"{head}_without_audio"}
