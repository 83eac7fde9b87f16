"""Events: hysteresis without flapping, stable ids, and a schema that every event satisfies."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import Manifest
from stream.event_format import PackInfo, Timing, rfc3339, source_event
from stream.events import EventTracker
from stream.masks import decode_mask
from stream.settings import EventSettings
from stream.types import CaptureClock, ClipWindow, ClockOrigin, EpochStart, Event, Prediction, WindowKey

S = 1_000_000_000
HOP = S // 2
OFFSET = 1_700_000_000 * S
SCHEMA = json.loads((Path(__file__).parents[2] / "stream/schema/event.v1.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CLOCK = CaptureClock(ClockOrigin.PTS, 5.0, OFFSET)
SHA = "ab" * 32
PACK = PackInfo("p", "1", SHA, "onnxruntime", "fp32")


def validate(event: Event) -> None:
    VALIDATOR.validate(
        {
            "specversion": "1.0",
            "id": event.id,
            "source": event.source,
            "type": event.type,
            "time": event.time,
            "subject": event.subject,
            "datacontenttype": "application/json",
            "dataschema": "urn:sightwire:event:v1",
            "data": json.loads(json.dumps(event.data)),
        }
    )


def manifest() -> Manifest:
    graph = {"name": "g", "file": "g.onnx", "sha256": SHA, "inputs": [], "outputs": []}
    graph["outputs"] = [{"name": n, "dtype": "float32", "shape": ["batch", 2]} for n in ("a", "m")]
    head = {"name": "action", "kind": "action", "output": "a", "labels": ["fall", "other"], "background": ["other"]}
    head |= {"activation": "sigmoid", "thresholds": {"fall": {"on": 0.7, "off": 0.3}}}
    mask = {"name": "scene", "kind": "segmentation", "output": "m", "labels": ["road", "car"]}
    watch = {"name": "watch", "mode": "clip", "window_ns": 2 * S, "hop_ns": HOP, "graph": "g", "heads": [head, mask]}
    watch["video"] = {"width": 8, "height": 8, "fps": "4"}
    fields = {"name": "p", "version": "1", "checkpoint_sha256": SHA, "graphs": [graph], "branches": [watch]}
    return Manifest.model_validate(fields)


def tracker(**over: Any) -> EventTracker:
    t = EventTracker(EventSettings(**over), [(manifest(), PACK)])
    t.begin_epoch(EpochStart("cam", 0, "e0", 0, True, False, 0, CLOCK, True, 0))
    return t


def window(index: int) -> ClipWindow:
    start = index * HOP
    return ClipWindow(
        key=WindowKey("cam", 0, "p", "watch", index),
        start_ns=start,
        end_ns=start + 2 * S,
        sample_ns=np.arange(8, dtype=np.int64),
        frame_pts_ns=np.zeros((8, 1), np.int64),
        frames=(None,) * 8,
        audio=None,
        audio_coverage=0.0,
        missing_frames=0,
        text=(),
        clock=CLOCK,
        arrival_ns=start + 2 * S,
        closed_ns=start + 2 * S + 1_000_000,
        waited_ns=0,
    )


def scored(index: int, fall: float, other: float = 0.0) -> Prediction:
    scores = np.array([fall, other], np.float32)
    less = {"video": np.array([fall / 2, 0], np.float32), "audio": np.array([fall / 4, 0], np.float32)}
    return Prediction(window(index).key, "action", scores, less, None, None)


def feed(t: EventTracker, scores: list[float], first: int = 0) -> list[Event]:
    events = []
    for index, score in enumerate(scores, first):
        done = window(index).closed_ns + 5_000_000
        timing = Timing(done - 3_000_000, done - 1_000_000, done, OFFSET + window(index).end_ns + 9_000_000)
        events += t.update(window(index), [scored(index, score)], timing, PACK)
    return events


def phases(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.subject, e.data["phase"]) for e in events]


def test_start_update_end() -> None:
    t = tracker(smoothing=1.0, on_windows=2, off_windows=3, update_s=1.0)
    events = feed(t, [0.1, 0.9, 0.8, 0.95, 0.9, 0.9, 0.2, 0.1, 0.1, 0.1])
    assert [(e.data["phase"], e.data["seq"]) for e in events] == [
        ("start", 0), ("update", 1), ("update", 2), ("end", 3),
    ]  # fmt: skip
    start, *_, end = events
    assert len({e.data["event_id"] for e in events}) == 1 and len({e.id for e in events}) == 4
    assert start.data["start_time"] == rfc3339(OFFSET + HOP), "when the score first was over the threshold"
    assert start.time == rfc3339(OFFSET + window(2).end_ns)
    assert start.data["modalities"] == {"video": 0.6667, "audio": 0.3333}
    assert start.data["latency_ms"] == {
        "decode": 1.0, "window": 0.0, "queue": 2.0, "infer": 2.0, "publish": 1.0, "total": 9.0,
    }  # fmt: skip
    assert end.data["reason"] == "score" and end.data["peak_score"] == 0.95
    for event in events:
        validate(event)


def test_one_high_window_is_no_event_and_background_never_is() -> None:
    t = tracker(smoothing=1.0, on_windows=2)
    assert feed(t, [0.1, 0.99, 0.1, 0.99, 0.1]) == []
    timing = Timing(0, 0, 0, 0)
    for index in range(5, 10):
        assert t.update(window(index), [scored(index, 0.0, other=0.99)], timing, PACK) == []


def test_a_lost_source_ends_what_runs_with_its_reason() -> None:
    t = tracker(smoothing=1.0)
    assert phases(feed(t, [0.9, 0.9])) == [("fall", "start")]
    (end,) = t.end_epoch("cam", "lost", 0, OFFSET)
    assert (end.data["phase"], end.data["reason"], end.data["seq"]) == ("end", "lost", 1)
    validate(end)
    assert t.end_epoch("cam", "lost", 0, OFFSET) == []
    assert feed(t, [0.9, 0.9]) == [], "no event outside an epoch"


@given(scores=st.lists(st.floats(0, 1), max_size=80), on=st.integers(1, 4), off=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_no_flapping_and_no_duplicate_starts(scores: list[float], on: int, off: int) -> None:
    t = tracker(on_windows=on, off_windows=off, update_s=1.0)
    events = feed(t, scores) + t.end_epoch("cam", "end_of_stream", 0, OFFSET)
    assert len({e.id for e in events}) == len(events)
    for _, group in itertools.groupby(events, key=lambda e: e.data["event_id"]):
        one = list(group)
        assert [e.data["seq"] for e in one] == list(range(len(one)))
        assert [e.data["phase"] for e in one] == ["start", *["update"] * (len(one) - 2), "end"]
    starts = [e.data["window"]["end_ns"] for e in events if e.data["phase"] == "start"]
    ends = [e.data["window"]["end_ns"] for e in events if e.data["phase"] == "end"]
    for ended, started in zip(ends, starts[1:], strict=False):
        assert started - ended >= on * HOP, "a new start needs on_windows windows after the end"
    for event in events:
        validate(event)


@given(scores=st.lists(st.floats(0, 1), max_size=40))
@settings(max_examples=30, deadline=None)
def test_a_replay_makes_the_same_events(scores: list[float]) -> None:
    def facts() -> list[tuple[str, str, str]]:
        t = tracker()
        events = feed(t, scores) + t.end_epoch("cam", "end_of_stream", 0, OFFSET)
        return [(e.id, e.subject, e.data["phase"]) for e in events]

    assert facts() == facts()


def test_ids_differ_between_epochs_that_begin_alike() -> None:
    ids = set()
    for identity in ("e0", "e1"):
        t = tracker(smoothing=1.0)
        t.begin_epoch(EpochStart("cam", 0, identity, 0, True, False, 0, CLOCK, True, 0))
        ids |= {e.id for e in feed(t, [0.9, 0.9])}
    assert len(ids) == 2


def test_segmentation_tells_areas_and_changes() -> None:
    t = tracker(area_change=0.1)
    mask = np.zeros((10, 10), np.uint8)

    def see(index: int, cars: int) -> list[Event]:
        seen = mask.copy()
        seen[:cars] = 1
        prediction = Prediction(window(index).key, "scene", None, {}, seen, None)
        return t.update(window(index), [prediction], Timing(0, 0, 0, 0), PACK)

    (start,) = see(0, 0)
    assert start.data["phase"] == "start" and start.data["areas"] == {"road": 1.0, "car": 0.0}
    assert see(1, 0) == []
    (update,) = see(2, 3)
    assert update.data["area_change"] == {"road": -0.3, "car": 0.3}
    assert decode_mask(update.data["mask"]["data"], (10, 10))[:3].all()
    (end,) = t.end_epoch("cam", "lost", 0, OFFSET)
    assert end.data["phase"] == "end" and "mask" not in end.data
    for event in (start, update, end):
        validate(event)


def test_windows_without_a_frame_or_a_sound_say_nothing() -> None:
    t = tracker(smoothing=1.0)
    blind = replace(window(0), frames=(None,) * 8, missing_frames=8)
    mask = Prediction(blind.key, "scene", None, {}, np.zeros((4, 4), np.uint8), None)
    assert t.update(blind, [mask, scored(0, 0.99)], Timing(0, 0, 0, 0), PACK) == []
    assert feed(t, [0.99], first=1) == [], "and do not count as a window over the threshold"


@pytest.mark.parametrize("phase", ["start", "end"])
def test_source_events_fit_the_schema(phase: str) -> None:
    event = source_event(
        "cam", phase, "i", 0, state="live", reason="start", message="cam is live", now_ns=1, now_wall_ns=OFFSET
    )
    validate(event)
    assert event.type == f"io.sightwire.source.{phase}.v1"
