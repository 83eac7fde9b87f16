"""When a new pack may take over: figures in, verdict out."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType, SimpleNamespace
from typing import cast

import numpy as np
import pytest

from engines.manifest import Head, Manifest
from stream.clock import NS_PER_S
from stream.disagreement import Disagreement, HeadDisagreement
from stream.engine_pool import PackLoad
from stream.event_format import PackInfo
from stream.packs import ServedPack
from stream.swap import RolledBack, Swap, SwapRequest, decision_share, engines_needed, judge, mask_share
from stream.trial import TrialFigures
from stream.types import Prediction
from tests.stream.test_events import SHA, manifest, window

MS = 1_000_000
INFO = PackInfo("p", "1", SHA, "onnxruntime", "fp32")


def figures(*, windows: int = 100, old_ms: float = 10, new_ms: float = 10, error: str | None = None) -> TrialFigures:
    heads = MappingProxyType({"action": HeadDisagreement(windows, other_side=0.04)} if windows else {})
    return TrialFigures(windows, heads, windows, int(windows * old_ms * MS), int(windows * new_ms * MS), error)


def verdict(
    found: TrialFigures,
    *,
    at_s: float,
    offered: int = 0,
    threads: int = 1,
    mask_share: float = 0.0,
    decision_share: float = 0.0,
    **asked: float,
) -> bool:
    request = SwapRequest(compare_s=10, **asked)
    shares = {"mask_share": mask_share, "decision_share": decision_share}
    swap = Swap("p", request, INFO, 0, **shares, compared_ns=int(at_s * NS_PER_S))
    loads = {"p": PackLoad(offered, 100, 100 * 10 * MS), "q": PackLoad(offered, 100, 100 * 5 * MS)}
    return judge(swap, found, loads, threads)


def test_it_waits_for_the_end_of_the_comparison() -> None:
    assert not verdict(figures(), at_s=9.9)
    assert verdict(figures(), at_s=10)


def test_an_error_is_the_cause_at_once() -> None:
    with pytest.raises(RolledBack, match="pack p: graph g holds NaN"):
        verdict(figures(windows=0, error="pack p: graph g holds NaN"), at_s=0)


def test_no_window_is_no_comparison() -> None:
    with pytest.raises(RolledBack, match="no window came in 10 s"):
        verdict(figures(windows=0), at_s=10)


def test_disagreement_counts_at_the_end() -> None:
    assert not verdict(figures(), at_s=5, max_disagreement=0.01)
    with pytest.raises(RolledBack, match=r"head action disagrees by 4\.0% \(over 100 windows\), more than the 1\.0%"):
        verdict(figures(), at_s=10, max_disagreement=0.01)
    assert verdict(figures(), at_s=10, max_disagreement=0.04)


def test_masks_may_differ_by_what_their_precision_allows() -> None:
    heads = MappingProxyType({"scene": HeadDisagreement(100, mask_agreement=0.9)})
    found = replace(figures(), heads=heads)
    with pytest.raises(RolledBack, match=r"head scene disagrees by 10\.0% .* more than the 5\.0% allowed"):
        verdict(found, at_s=10)
    assert verdict(found, at_s=10, mask_share=0.15)
    with pytest.raises(RolledBack, match=r"more than the 7\.0% allowed"):
        verdict(found, at_s=10, mask_share=0.07)
    with pytest.raises(RolledBack, match=r"more than the 1\.0% allowed"):
        verdict(found, at_s=10, mask_share=0.15, max_disagreement=0.01)
    other = replace(figures(), heads=MappingProxyType({"action": HeadDisagreement(100, other_side=0.1)}))
    with pytest.raises(RolledBack, match=r"head action disagrees by 10\.0% .* more than the 5\.0% allowed"):
        verdict(other, at_s=10, mask_share=0.15, decision_share=0.02)
    assert verdict(other, at_s=10, decision_share=0.11)
    with pytest.raises(RolledBack, match=r"more than the 5\.0% allowed"):
        verdict(found, at_s=10, decision_share=0.5)


def test_the_less_exact_pack_decides() -> None:
    bounds = manifest().model_copy(update={"decision_bounds": {"fp32": 1.0, "bf16": 0.9, "int8": 0.8}})

    def packs(*precisions: str) -> list[ServedPack]:
        found = [SimpleNamespace(manifest=bounds, info=replace(INFO, precision=one)) for one in precisions]
        return cast("list[ServedPack]", found)

    def share(*precisions: str) -> float:
        return mask_share(*packs(*precisions))

    assert decision_share(*packs("fp32", "fp32")) == 0
    assert decision_share(*packs("fp32", "bf16+fp32")) == pytest.approx(0.1)
    assert decision_share(*packs("int8", "bf16")) == pytest.approx(0.2)
    assert share("fp32", "fp32") == pytest.approx(0.001)
    assert share("fp32", "bf16+fp32") == pytest.approx(0.07)
    assert share("int8", "bf16") == pytest.approx(0.15)


def test_too_slow_is_what_the_live_sources_would_need_more_threads_for() -> None:
    # 5 s: 200 windows of p at 20 ms and 200 of q at 5 ms are 5 s of work, just one thread's.
    assert not verdict(figures(new_ms=20), at_s=5, offered=200)
    with pytest.raises(RolledBack, match=r"too slow: it takes 21.0 ms a window \(10.0 ms now\).* 1\.04 engine threads"):
        verdict(figures(new_ms=21), at_s=5, offered=200)
    assert not verdict(figures(new_ms=21), at_s=5, offered=200, threads=2)
    # Recordings wait: they offer nothing that could be dropped.
    assert not verdict(figures(new_ms=1000), at_s=5, offered=0)
    # Too early to say.
    assert not verdict(figures(new_ms=1000), at_s=1, offered=200)
    # Too slow as it is, but better than before.
    assert not verdict(figures(new_ms=9), at_s=5, offered=2000)


def test_threads_needed() -> None:
    loads = {"p": PackLoad(30, 10, 100 * MS), "q": PackLoad(10, 0, 0)}
    assert engines_needed(loads, NS_PER_S, {}) == pytest.approx(0.3)
    assert engines_needed(loads, NS_PER_S, {"p": 100 * MS, "q": 50 * MS}) == pytest.approx(3.5)


def predictions(index: int, scores: list[float], mask: list[list[int]]) -> list[Prediction]:
    key = window(index).key
    return [
        Prediction(key, "action", np.array(scores, np.float32), {}, None, None),
        Prediction(key, "scene", None, {}, np.array(mask, np.uint8), None),
    ]


def test_disagreement_head_by_head() -> None:
    found = Disagreement(manifest(), manifest())
    same, other = [[0, 0], [1, 1]], [[0, 0], [0, 1]]
    # Over and under the threshold of 0.7; the background label does not count.
    found.add([window(0)], [predictions(0, [0.8, 0.1], same)], [predictions(0, [0.6, 0.1], same)])
    found.add([window(1)], [predictions(1, [0.8, 0.1], same)], [predictions(1, [0.9, 0.9], other)])
    heads = found.heads()
    assert heads["action"].windows == 2 and heads["action"].other_side == 0.5 and heads["action"].other_top is None
    assert heads["action"].score_difference == pytest.approx((0.1 + 0.45) / 2)
    assert heads["action"].share == 0.5
    assert heads["scene"].mask_agreement == pytest.approx(0.875) and heads["scene"].share == pytest.approx(0.125)


def test_the_top_label_counts_where_one_excludes_the_others() -> None:
    fields = manifest().model_dump()
    fields["branches"][0]["heads"][0]["activation"] = "softmax"
    exclusive = Manifest.model_validate(fields)
    found = Disagreement(exclusive, exclusive)
    mask = [[0]]
    found.add([window(0)], [predictions(0, [0.51, 0.49], mask)], [predictions(0, [0.49, 0.51], mask)])
    assert found.heads()["action"].other_top == 1 and found.heads()["action"].other_side == 0
    assert found.heads()["action"].share == 1


def test_masks_of_another_size_are_compared_by_place() -> None:
    found = Disagreement(manifest(), manifest())
    coarse, fine = [[0, 1]], [[0, 0, 1, 1], [0, 0, 1, 0]]
    found.add([window(0)], [predictions(0, [0, 0], fine)], [predictions(0, [0, 0], coarse)])
    assert found.heads()["scene"].mask_agreement == pytest.approx(7 / 8)


def test_answers_of_another_shape_cannot_be_compared() -> None:
    found = Disagreement(manifest(), manifest())
    with pytest.raises(ValueError, match="head action has 3 scores, not 2"):
        found.add([window(0)], [predictions(0, [0, 0], [[0]])], [predictions(0, [0, 0, 0], [[0]])])


def test_windows_in_which_nothing_was_seen_are_left_out() -> None:
    blind = replace(window(0), missing_frames=len(window(0).sample_ns))
    found = Disagreement(manifest(), manifest())
    found.add([blind], [predictions(0, [0.9, 0], [[0]])], [predictions(0, [0, 0], [[1]])])
    assert found.heads() == {}


def test_embeddings_by_their_angle() -> None:
    fields = manifest().model_dump(mode="json")
    fields["branches"][0]["heads"][0] = Head.model_validate(
        {"name": "moment", "kind": "embedding", "output": "a"}
    ).model_dump(mode="json")
    embedding = Manifest.model_validate(fields)
    found = Disagreement(embedding, embedding)
    key = window(0).key
    vectors = ([1.0, 0.0], [1.0, 1.0])
    old, new = ([Prediction(key, "moment", None, {}, None, np.array(v, np.float32))] for v in vectors)
    found.add([window(0)], [old], [new])
    assert found.heads()["moment"].cosine == pytest.approx(2**-0.5)
