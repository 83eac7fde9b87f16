"""Masks: round trips, damaged input, and the formats others read."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import av
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.masks import decode_mask, encode_mask, mask_to_coco, mask_to_png, voc_palette

sizes = st.tuples(st.integers(1, 40), st.integers(1, 600))
masks = sizes.flatmap(lambda size: hnp.arrays(np.uint8, size, elements=st.integers(0, 11), fill=st.integers(0, 2)))


@given(masks)
def test_a_mask_survives_the_round_trip(mask: Any) -> None:
    assert np.array_equal(decode_mask(encode_mask(mask), mask.shape), mask)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 512, 513, 70_000])
def test_long_runs_are_split_at_256(length: int) -> None:
    mask = np.concatenate([np.full(length, 7, np.uint8), np.zeros(3, np.uint8)])[None]
    text = encode_mask(mask)
    assert np.array_equal(decode_mask(text, mask.shape), mask)
    assert len(zlib.decompress(base64.b64decode(text))) == 2 * (-(-length // 256) + 1)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_mask_without_pixels_round_trips(shape: tuple[int, int]) -> None:
    assert decode_mask(encode_mask(np.zeros(shape, np.uint8)), shape).shape == shape


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_mask(np.zeros((2, 2), np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="uint8"):
        encode_mask(np.zeros((2, 2, 1), np.uint8))


def _packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("not base64!", "damaged"),
        ("é", "damaged"),
        (base64.b64encode(b"not zlib").decode(), "damaged"),
        (_packed(b"abc"), "no length"),
        (_packed(b"\0" * 10_000_000), "more pixels"),
        (_packed(bytes([1, 5])), "covers 6 pixels"),
        (encode_mask(np.zeros((4, 4), np.uint8))[:-8], "cut short|damaged"),
    ],
)
def test_damaged_text_is_a_value_error(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        decode_mask(text, (4, 4))


def test_an_absurd_size_is_refused_before_allocating() -> None:
    with pytest.raises(ValueError, match="out of range"):
        decode_mask("", (1 << 20, 1 << 20))


@given(masks, st.integers(0, 11))
def test_coco_counts_rebuild_the_class(mask: Any, class_index: int) -> None:
    coco = mask_to_coco(mask, class_index, compressed=False)
    values = np.arange(len(coco["counts"])) % 2 == 1
    rebuilt = np.repeat(values, coco["counts"]).reshape(mask.shape[::-1]).T
    assert np.array_equal(rebuilt, mask == class_index)


def test_coco_text_is_what_pycocotools_writes() -> None:
    # pycocotools 2.0: mask.encode(np.asfortranarray(m == 1))["counts"]
    mask = np.zeros((30, 40), np.uint8)
    mask[3:20, 5:31] = 1
    mask[25, 39] = 1
    assert mask_to_coco(mask, 1)["counts"] == "i4a0=" + "0" * 49 + "V8@aG"
    assert mask_to_coco(mask, 0)["counts"] == "0i4a0dK" + "0" * 49 + "V8@aG"
    assert mask_to_coco(mask, 2)["counts"] == "`U1"


@pytest.mark.parametrize("palette", [None, np.array([[1, 2, 3], [250, 128, 0], [9, 99, 199]], np.uint8)])
def test_a_png_decoder_reads_the_png(palette: Any) -> None:
    mask = np.random.default_rng(1).integers(0, 3, (33, 47), np.uint8)
    with av.open(io.BytesIO(mask_to_png(mask, palette)), format="png_pipe") as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(image, (voc_palette() if palette is None else palette)[mask])


def test_a_png_needs_a_colour_for_every_class() -> None:
    with pytest.raises(ValueError, match="colour"):
        mask_to_png(np.full((2, 2), 3, np.uint8), np.zeros((3, 3), np.uint8))


def test_the_default_palette_is_that_of_pascal_voc() -> None:
    assert voc_palette()[[0, 1, 2, 15, 20]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
    ]
