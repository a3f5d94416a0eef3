"""Run-length codes against a decoder that walks them number by number."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from refseg_jax.data import rle

SHAPES = [(1, 1), (1, 9), (13, 1), (20, 31), (300, 40)]


def slow_decode(counts: bytes, height: int, width: int) -> np.ndarray:
    """bool [height, width], from the format's description: 5 bits a character, then differences."""
    runs, position = [], 0
    while position < len(counts):
        value, shift = 0, 0
        while True:
            digit = counts[position] - 48
            position += 1
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                break
        if digit & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
    pixels = np.concatenate([np.full(run, k % 2, bool) for k, run in enumerate(runs)])
    return pixels.reshape(width, height).T


def masks(rng, height, width):
    yield np.zeros((height, width), bool)
    yield np.ones((height, width), bool)
    for share in (0.02, 0.5, 0.9):
        yield rng.random((height, width)) < share


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape):
    for mask in masks(np.random.default_rng(0), *shape):
        counts = rle.encode(mask)
        decoded = rle.decode(counts, *shape)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(slow_decode(counts, *shape), mask)
        runs = rle._uncompressed(counts).tolist()
        parts = [{"size": list(shape), "counts": runs}]
        np.testing.assert_array_equal(rle.decode_parts(parts, *shape)[..., 0], mask)


def mutations(rng, counts: bytes):
    """Damaged codes: bytes changed, cut off, added, and nonsense of the right characters."""
    for _ in range(700):
        changed = bytearray(counts)
        changed[rng.integers(len(changed))] = rng.integers(256)
        yield bytes(changed)
        yield counts[: rng.integers(len(counts))]
        yield counts + rng.integers(48, 112, 1 + rng.integers(9)).astype(np.uint8).tobytes()
        yield rng.integers(48, 112, rng.integers(40)).astype(np.uint8).tobytes()
        yield rng.bytes(rng.integers(40))


def test_damaged_codes_are_refused_or_decoded_exactly():
    """pycocotools by itself ends the process on many of these."""
    rng = np.random.default_rng(1)
    height, width = 20, 30
    counts = rle.encode(rng.random((height, width)) < 0.1)
    refused = accepted = 0
    for damaged in mutations(rng, counts):
        try:
            mask = rle.decode(damaged, height, width)
        except ValueError as error:
            assert "run-length code" in str(error)
            refused += 1
            continue
        np.testing.assert_array_equal(mask, slow_decode(damaged, height, width))
        accepted += 1
    assert refused > 3000 and accepted < 100


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"size": [20, 30], "counts": [600, -600, 600]}, "does not cover"),
        ({"size": [20, 30], "counts": [1 << 70]}, "does not cover"),
        ({"size": [20, 30], "counts": [599.0, 1]}, "does not cover"),
        ({"size": [20, 30], "counts": "é"}, "damaged"),
        ({"size": [20, 30], "counts": None}, "TypeError"),
        ({"size": 20, "counts": [600]}, "TypeError"),
        ({"size": [30, 20], "counts": [600]}, "size"),
        ({"counts": [600]}, "KeyError"),
        ([0, 0, 9, 0], "three or more points"),
        ([0, 0, 9, 0, 9, 9, 9], "three or more points"),
        ([[0, 0], [9, 0], [9, 9]], "three or more points"),
        ([0, 0, 1e9, 0, 9, 9], "outside its image"),
        ([0, 0, float("nan"), 0, 9, 9], "outside its image"),
        ([0, 0, float("inf"), 0, 9, 9], "outside its image"),
        (["a"] * 6, "could not convert"),
        ([None] * 6, "outside its image"),
        (7, "neither a polygon nor"),
        (None, "neither a polygon nor"),
    ],
)
def test_parts_that_cannot_be(part, message):
    with pytest.raises(ValueError, match=message):
        rle.decode_parts([part], 20, 30)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (1 << 20, 1 << 20)])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="cannot be"):
        rle.decode_parts([[0, 0, 1, 0, 1, 1]], *size)


def test_polygons_are_as_pycocotools_draws_them_even_over_the_edge():
    rng = np.random.default_rng(2)
    for _ in range(50):
        polygon = rng.uniform(-10, 40, 2 * rng.integers(3, 9)).tolist()
        expected = coco_mask.decode(coco_mask.frPyObjects([polygon], 20, 30))[..., 0]
        np.testing.assert_array_equal(rle.decode_parts([polygon], 20, 30)[..., 0], expected)
