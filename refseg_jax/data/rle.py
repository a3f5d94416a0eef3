"""Masks as pycocotools' run-length codes, and polygons, checked before pycocotools sees them.

Its C code trusts what it is given: a code that does not fit its image, or a polygon far outside
of it, writes over memory that is not its own. Codes are decoded here, which is faster as well.
"""

import numpy as np
from pycocotools import mask as coco_mask

# Pixels of the largest image: Pillow refuses twice as many as its own limit, which is near this.
MAX_PIXELS = 1 << 27


def encode(mask: np.ndarray) -> bytes:
    """bool [H, W] -> the compressed run lengths, the same bytes for the same mask."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]


def decode(counts: bytes, height: int, width: int) -> np.ndarray:
    """Compressed run lengths -> bool [height, width]. ValueError: they do not fit that size."""
    return decode_parts([{"size": [height, width], "counts": counts}], height, width)[..., 0]


def drawable(segmentation: list | dict) -> list[list | dict]:
    """The parts of a COCO segmentation that enclose anything."""
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    # Fewer than three points enclose nothing (and pycocotools would take two for a box).
    return [part for part in parts if not isinstance(part, list) or len(part) >= 6]


def decode_parts(parts: list[list | dict], height: int, width: int) -> np.ndarray:
    """Polygons [x0, y0, x1, y1, ...] and run-length codes -> bool [height, width, len(parts)].

    Raises:
      ValueError: a part is damaged or does not fit the image.
    """
    check_size(height, width)
    masks = np.empty((len(parts), width, height), bool)
    try:
        for mask, part in zip(masks, parts, strict=True):
            runs = _run_lengths(part, height, width)
            mask.ravel()[:] = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return masks.transpose(2, 1, 0)


def check_size(height: int, width: int) -> None:
    """ValueError: no image has that size."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels cannot be")


def _run_lengths(part: list | dict, height: int, width: int) -> np.ndarray | list[int]:
    """One polygon or run-length code -> lengths of its runs, which cover the image."""
    if isinstance(part, list):
        points = np.asarray(part, np.float64)
        # Annotators slip over the edge by a little; the time and memory of a line grow with it.
        reach = 2 * max(height, width)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise ValueError("a polygon that is no list of three or more points x, y")
        if not (np.abs(points) <= reach).all():
            raise ValueError("a polygon that lies outside its image")
        return _uncompressed(coco_mask.frPyObjects([points.tolist()], height, width)[0]["counts"])
    if not isinstance(part, dict):
        raise ValueError(f"{part!r:.40} is neither a polygon nor a run-length code")
    size, counts = tuple(part["size"]), part["counts"]
    if size != (height, width):
        raise ValueError(f"a run-length code of size {size} on an image of {(height, width)}")
    if isinstance(counts, list):
        runs = counts
    else:
        runs = _uncompressed(counts.encode() if isinstance(counts, str) else counts).tolist()
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != height * width:
        raise ValueError("a run-length code that does not cover its image")
    return runs


def _uncompressed(counts: bytes) -> np.ndarray:
    """int64 run lengths of a compressed code.

    A number is a chain of 6-bit characters, lowest first: 5 bits and whether more follow, the last
    one's top bit being the sign. From the fourth on, it is the difference to the run before last.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = digits & 32 == 0
    if not len(digits) or not last[-1] or (digits < 0).any() or (digits > 63).any():
        raise ValueError("a run-length code that is damaged")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        raise ValueError("a run-length code that is damaged")
    place = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((digits & 31) << place, starts)
    runs -= np.where(digits[ends] & 16, 1 << (place[ends] + 5), 0)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return runs
