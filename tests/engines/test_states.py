"""States of streams: who keeps them, who loses them, and that no stream ever gets another's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from engines.manifest import Manifest, Mode, TensorSpec
from engines.states import StateStore, row_bytes
from engines.tinystateful import write_tiny_stateful_pack

STATES = (
    TensorSpec(name="sums", dtype="float32", shape=("batch", 3)),
    TensorSpec(name="picture", dtype="uint8", shape=("batch", 2, 2)),
)


def filled(*values: int) -> dict[str, np.ndarray]:
    return {
        "sums": np.array([[value] * 3 for value in values], np.float32),
        "picture": np.array([[[value] * 2] * 2 for value in values], np.uint8),
    }


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)


def test_states_come_back_as_they_were_put() -> None:
    store: StateStore[str] = StateStore(STATES, limit=8)
    marks, states = store.gather(["a", "b"])
    assert marks == [None, None]
    assert {name: (array.shape, array.dtype.name) for name, array in states.items()} == {
        "sums": ((2, 3), "float32"),
        "picture": ((2, 2, 2), "uint8"),
    }
    assert all(not array.any() for array in states.values()), "zeros are the empty past"
    store.put(["a", "b"], ["one", "two"], filled(1, 2))
    store.put(["c"], ["three"], filled(3))
    marks, states = store.gather(["c", "new", "a"])
    assert marks == ["three", None, "one"]
    for name, array in filled(3, 0, 1).items():
        np.testing.assert_array_equal(states[name], array)
    np.testing.assert_array_equal(store.gather(["a"])[1]["sums"], filled(1)["sums"])
    store.put(["a"], ["later"], filled(7))
    assert store.gather(["a"])[0] == ["later"] and len(store) == 3


def test_streams_are_kept_up_to_the_limit_and_no_further() -> None:
    store: StateStore[int] = StateStore(STATES, limit=10)
    assert store.nbytes == 0 and row_bytes(STATES) == 16
    sizes = []
    for n in range(20):
        store.put([f"s{n}"], [n], filled(n))
        sizes.append(store.nbytes // row_bytes(STATES))
    assert sizes == [*range(1, 11)] + [10] * 10
    assert len(store) == 10 and store.evicted == 10
    marks, states = store.gather([f"s{n}" for n in range(20)])
    assert marks == [None] * 10 + list(range(10, 20))
    np.testing.assert_array_equal(states["sums"][:, 0], [0] * 10 + list(range(10, 20)))


def test_the_stream_used_longest_ago_makes_way() -> None:
    store: StateStore[int] = StateStore(STATES, limit=2)
    store.put(["a", "b"], [1, 2], filled(1, 2))
    store.gather(["a"])
    store.put(["c"], [3], filled(3))
    assert store.gather(["a", "b", "c"])[0] == [1, None, 3]
    # A stream that is put never makes way for one that is put with it.
    store.put(["d", "a"], [4, 5], filled(4, 5))
    assert store.gather(["d", "a", "c"])[0] == [4, 5, None]
    assert store.evicted == 2


def test_more_streams_at_once_than_rows() -> None:
    store: StateStore[int] = StateStore(STATES, limit=2)
    store.put(["a"], [0], filled(9))
    store.put(["a", "b", "c"], [1, 2, 3], filled(1, 2, 3))
    marks, states = store.gather(["a", "b", "c"])
    assert marks == [None, 2, 3], "an old state must not pass for the new one"
    np.testing.assert_array_equal(states["sums"][:, 0], [0, 2, 3])


def test_what_was_read_stays_when_its_stream_makes_way() -> None:
    store: StateStore[int] = StateStore(STATES, limit=1)
    store.put(["a"], [1], filled(1))
    _, states = store.gather(["a"])
    store.put(["b"], [2], filled(2))
    store.forget("b")
    np.testing.assert_array_equal(states["sums"], filled(1)["sums"])
    assert store.gather(["a", "b"])[0] == [None, None] and store.evicted == 1


def test_arrays_of_one_stream_are_not_copied_and_rows_of_larger_ones_are() -> None:
    store: StateStore[int] = StateStore(STATES, limit=4)
    own, both = filled(1), filled(2, 3)
    store.put(["a"], [1], own)
    store.put(["b", "c"], [2, 3], both)
    store.put(["d"], [4], {name: array[1:] for name, array in both.items()})
    assert all(store.gather(["a"])[1][name] is array for name, array in own.items())
    for stream, value in (("b", 2), ("c", 3), ("d", 3)):
        states = store.gather([stream])[1]
        assert all(array.shape[0] == 1 and array.base is None for array in states.values())
        np.testing.assert_array_equal(states["sums"], filled(value)["sums"])


def test_buffers_are_used_again() -> None:
    store: StateStore[int] = StateStore(STATES, limit=4)
    store.put(["a", "b"], [1, 2], filled(1, 2))
    buffers = store.buffers(3)
    _, states = store.gather(["b", "new", "a"], buffers)
    assert all(np.shares_memory(states[name], buffers[name]) for name in buffers)
    np.testing.assert_array_equal(states["sums"], filled(2, 0, 1)["sums"])
    np.testing.assert_array_equal(store.gather(["new", "b"], buffers)[1]["sums"], filled(0, 2)["sums"])


def test_forgotten_streams_leave_nothing() -> None:
    store: StateStore[int] = StateStore(STATES, limit=100)
    for n in range(1000):
        store.put([f"s{n}"], [n], filled(n % 256))
        store.forget(f"s{n - 2}")
        store.forget("never there")
    assert len(store) == 2 and store.nbytes == 2 * row_bytes(STATES) and store.evicted == 0


def test_a_store_for_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="for 0 streams"):
        StateStore(STATES, limit=0)


def test_threads_do_not_meet(often_switched: None) -> None:
    """Each thread writes its own number into its own streams and must read nothing else, as streams come and go."""
    store: StateStore[int] = StateStore(STATES, limit=5)
    wrong: list[str] = []
    begin = threading.Barrier(4)

    def work(thread: int) -> None:
        begin.wait()
        random = np.random.default_rng(thread)
        latest: dict[str, int] = {}
        for count in range(1, 400):
            names = [f"{thread}-{n}" for n in sorted(set(random.integers(0, 6, 3)))]
            marks, states = store.gather(names)
            for row, (name, mark) in enumerate(zip(names, marks, strict=True)):
                kept = 0.0 if mark is None else float(mark)
                if not (states["sums"][row] == kept).all() or (mark is not None and latest[name] != mark):
                    wrong.append(f"{name}: {mark} {states['sums'][row]}")
                latest[name] = thread * 1000 + count
            values = np.array([[latest[name]] * 3 for name in names], np.float32)
            store.put(names, [latest[n] for n in names], {**filled(*[0] * len(names)), "sums": values})
            if count % 50 == 0:
                store.forget(names[0])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and store.evicted > 0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_tiny_stateful_pack(tmp_path_factory.mktemp("pack"), parity=False)


def changed(manifest: Manifest, **graph: object) -> Manifest:
    fields = manifest.model_dump()
    fields["graphs"][0].update(graph)
    return Manifest.model_validate(fields)


def branch_with(manifest: Manifest, **values: object) -> Manifest:
    fields = manifest.model_dump()
    fields["branches"][0].update(values)
    return Manifest.model_validate(fields)


def test_a_stateful_manifest_reads_back(manifest: Manifest) -> None:
    (branch,) = manifest.branches
    assert branch.mode is Mode.STATEFUL and [state.output for state in branch.states] == [
        "next_average",
        "next_picture",
    ]
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"states": []}, "states go with stateful mode"),
        ({"mode": "clip"}, "states go with stateful mode"),
        ({"window_ns": 2_250_000_000}, "a window of whole hops"),
        ({"hop_ns": 1_000_000_000}, r"takes frames uint8.*but a hop has uint8\['batch', 4, 32, 32, 3\]"),
        ({"states": [{"input": "average", "output": "gone"}]}, "has no output gone, which is to hold a state"),
        ({"states": [{"input": "gone", "output": "next_average"}]}, "has no input gone, which is to hold a state"),
        ({"states": [{"input": "average", "output": "next_average"}]}, "takes picture, which is neither"),
        ({"states": [{"input": "average", "output": "next_picture"}]}, "takes state average as float32.*uint8"),
        (
            {
                "states": [
                    {"input": "average", "output": "next_average"},
                    {"input": "average", "output": "next_average"},
                ]
            },
            "tensor average is named by two states",
        ),
    ],
)
def test_what_does_not_fit_is_refused(manifest: Manifest, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branch_with(manifest, **values)


def test_states_must_have_a_free_batch_and_fixed_sizes(manifest: Manifest) -> None:
    fields = manifest.graphs[0].model_dump()
    for shape in ((1, 2), ("batch", "other"), ()):
        inputs = [{**t, "shape": shape} if t["name"] == "average" else t for t in fields["inputs"]]
        outputs = [{**t, "shape": shape} if t["name"] == "next_average" else t for t in fields["outputs"]]
        with pytest.raises(ValueError, match="its first axis must be the free batch"):
            changed(manifest, inputs=inputs, outputs=outputs)


def test_a_head_may_not_read_a_state(manifest: Manifest) -> None:
    (head,) = manifest.branches[0].heads
    spoiled = {**head.model_dump(), "output": "next_average"}
    with pytest.raises(ValueError, match="head action reads next_average, which is a state"):
        branch_with(manifest, heads=[spoiled])
