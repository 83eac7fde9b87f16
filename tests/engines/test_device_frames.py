"""Frames on a device: each uploaded once, gathered by index, rings bounded. On a CPU there are no streams."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from engines.device_colour import to_rgb  # noqa: E402
from engines.device_frames import DeviceFrames, Picture, ring_slots  # noqa: E402
from engines.errors import BackendUnavailable  # noqa: E402
from engines.yuv import YuvFormat, YuvPicture  # noqa: E402
from tests.gpu import DEVICES, HAS_GPU  # noqa: E402

HEIGHT, WIDTH = 6, 8


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (HEIGHT, WIDTH, 3), np.uint8)


def expected(wanted: list[tuple[str, Picture | None]]) -> NDArray[np.uint8]:
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    return np.stack([black if image is None else np.asarray(image) for _, image in wanted])


@pytest.fixture(params=DEVICES)
def frames(request: pytest.FixtureRequest) -> DeviceFrames:
    return DeviceFrames(WIDTH, HEIGHT, slots=4, device=request.param)


def gathered(frames: DeviceFrames, wanted: list[tuple[str, Picture | None]]) -> NDArray[np.uint8]:
    return np.asarray(frames.gather(wanted).cpu().numpy())


def test_a_batch_over_sources_is_what_was_asked_for(frames: DeviceFrames) -> None:
    a, b, c = picture(1), picture(2), picture(3)
    wanted: list[tuple[str, Picture | None]] = [("one", a), ("two", c), ("one", None), ("one", b), ("one", a)]
    np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
    assert (frames.counts.uploads, frames.counts.hits, frames.counts.evictions) == (3, 1, 0)
    assert frames.counts.uploaded_bytes == 3 * HEIGHT * WIDTH * 3
    np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
    assert (frames.counts.uploads, frames.counts.hits) == (3, 5), "nothing is uploaded twice"


def test_it_writes_where_it_is_told(frames: DeviceFrames) -> None:
    images = [picture(n) for n in range(3)]
    out = torch.zeros((3, HEIGHT, WIDTH, 3), dtype=torch.uint8, device=frames.gather([]).device)
    assert frames.gather([("cam", image) for image in images], out) is out
    np.testing.assert_array_equal(out.cpu().numpy(), np.stack(images))


def test_sliding_windows_upload_each_frame_once_and_the_oldest_makes_way(frames: DeviceFrames) -> None:
    stream = [picture(n) for n in range(20)]
    for start in range(17):
        window: list[tuple[str, Picture | None]] = [("cam", image) for image in stream[start : start + 4]]
        np.testing.assert_array_equal(gathered(frames, window), expected(window))
    assert frames.counts.uploads == 20
    assert frames.counts.hits == 17 * 4 - 20
    assert frames.counts.evictions == 16, "the test still holds them all"
    assert frames.bytes_per_source == 4 * HEIGHT * WIDTH * 3


def test_what_a_batch_needs_does_not_make_way_for_the_rest_of_it(frames: DeviceFrames) -> None:
    old = [picture(n) for n in range(4)]
    gathered(frames, [("cam", image) for image in old])
    wanted: list[tuple[str, Picture | None]] = [("cam", image) for image in (old[0], picture(7), old[1], picture(8))]
    np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
    assert (frames.counts.uploads, frames.counts.hits) == (6, 2)


def test_more_pictures_than_slots_are_gathered_in_parts(frames: DeviceFrames) -> None:
    images = [picture(n) for n in range(11)]
    wanted: list[tuple[str, Picture | None]] = [(name, image) for image in images for name in ("one", "two")]
    np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
    backwards = wanted[::-1]
    np.testing.assert_array_equal(gathered(frames, backwards), expected(backwards))


def test_a_new_picture_at_an_old_address_is_uploaded(frames: DeviceFrames) -> None:
    """Objects that are gone leave their ids to others."""
    for seed in range(50):
        image = picture(seed)
        np.testing.assert_array_equal(gathered(frames, [("cam", image)])[0], image)
        del image
    assert frames.counts.uploads == 50
    assert frames.counts.evictions == 0, "nobody can ask for any of them again"


def test_sources_come_and_go_without_growing(frames: DeviceFrames) -> None:
    images = {f"cam{n}": picture(n) for n in range(9)}
    wanted: list[tuple[str, Picture | None]] = list(images.items())
    np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
    assert frames.sources == 9
    before = frames.memory_bytes
    assert before >= 9 * frames.bytes_per_source
    for round_ in range(5):
        for name in images:
            frames.forget(name)
        assert frames.sources == 0
        wanted = [(f"new{round_}-{n}", image) for n, image in enumerate(images.values())]
        np.testing.assert_array_equal(gathered(frames, wanted), expected(wanted))
        for name, _ in wanted:
            frames.forget(name)
    assert frames.memory_bytes == before


def test_a_forgotten_source_is_uploaded_again(frames: DeviceFrames) -> None:
    image = picture(1)
    gathered(frames, [("cam", image)])
    frames.forget("cam")
    gathered(frames, [("other", picture(2))])
    np.testing.assert_array_equal(gathered(frames, [("cam", image)])[0], image)
    assert frames.counts.uploads == 3


def test_a_picture_of_another_size_is_refused_and_nothing_is_lost(frames: DeviceFrames) -> None:
    good = picture(1)
    with pytest.raises(ValueError, match=r"a picture is \[2, 2, 3\], must be \[6, 8, 3\]"):
        frames.gather([("cam", good), ("cam", np.zeros((2, 2, 3), np.uint8))])
    np.testing.assert_array_equal(gathered(frames, [("cam", good)])[0], good)


def test_threads_see_their_own_pictures(frames: DeviceFrames) -> None:
    wrong: list[str] = []

    def run(name: str, seed: int) -> None:
        stream = [picture(seed + n) for n in range(60)]
        for start in range(56):
            window: list[tuple[str, Picture | None]] = [(name, image) for image in stream[start : start + 4]]
            if not np.array_equal(gathered(frames, window), expected(window)):
                wrong.append(f"{name} {start}")

    threads = [threading.Thread(target=run, args=(f"cam{n % 2}", 100 * n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_decoded_pictures_are_converted_as_they_are_uploaded(frames: DeviceFrames) -> None:
    rng = np.random.default_rng(5)
    form = YuvFormat(32, 16)
    planes = [tuple(rng.integers(0, 256, shape, np.uint8) for shape in ((16, 32), (8, 16), (8, 16))) for _ in range(3)]
    pictures = [YuvPicture(form, own) for own in planes]
    mixed: list[tuple[str, Picture | None]] = [("cam", pictures[0]), ("cam", picture(1)), ("two", pictures[1])]
    got = gathered(frames, mixed)
    packed = torch.from_numpy(np.stack([np.concatenate([plane.ravel() for plane in own]) for own in planes[:2]]))
    want = to_rgb(packed, form, WIDTH, HEIGHT).numpy()
    # Processors and GPUs may round a value that lies on an edge to either side of it.
    assert np.abs(got[[0, 2]].astype(int) - want.astype(int)).max() <= (
        0 if frames.gather([]).device.type == "cpu" else 1
    )
    np.testing.assert_array_equal(got[1], np.asarray(mixed[1][1]))
    assert frames.counts.uploaded_bytes == 2 * form.size + HEIGHT * WIDTH * 3


def test_slots() -> None:
    assert ring_slots(16, 4, 2, 1) == 32
    assert ring_slots(16, 4, 2, 3) == 48
    assert ring_slots(1, 1, 1, 2) == 2
    with pytest.raises(ValueError, match="at least 2 slots"):
        DeviceFrames(8, 8, 1, "cpu")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BackendUnavailable, match="has no CUDA device here; choose device cpu"):
        DeviceFrames(8, 8, 4, "cuda")
