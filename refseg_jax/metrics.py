"""Pixel counts -> oIoU, mIoU and Precision@X.

Everything is computed from exact integer counts per sentence. Counts from several processes are
simply concatenated; the division comes last, so a score does not depend on how the sentences were
spread over batches or hosts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
NAMES = ("oIoU", "mIoU", *(f"P@{x}" for x in THRESHOLDS))


def overlap(prediction: Any, truth: Any) -> tuple[Any, Any]:
    """Pixel counts of intersection and union.

    Args:
      prediction, truth: bool [..., H, W], NumPy or JAX.

    Returns:
      (intersection, union), integers [...].
    """
    return (prediction & truth).sum((-2, -1)), (prediction | truth).sum((-2, -1))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Pixel counts of M sentences: three int64 [M] arrays.

    `index` is the number of the sentence in its source. Scores read the other two only.
    """

    index: np.ndarray
    intersection: np.ndarray
    union: np.ndarray

    @classmethod
    def from_rows(cls, rows: Any) -> "Counts":
        """Rows of (index, intersection, union), e.g. gathered from all processes, in any order.

        Padding rows (index < 0) are dropped and the rest is ordered by index. An index that
        comes twice is an error of the caller: ValueError.
        """
        rows = np.asarray(rows, np.int64).reshape(-1, 3)
        rows = rows[rows[:, 0] >= 0]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        if (np.diff(rows[:, 0]) == 0).any():
            raise ValueError("a sentence was counted twice")
        return cls(*rows.T)

    def __len__(self) -> int:
        return len(self.index)

    def select(self, chosen: np.ndarray) -> "Counts":
        """The sentences picked by a bool mask or an index array."""
        return Counts(self.index[chosen], self.intersection[chosen], self.union[chosen])

    @property
    def iou(self) -> np.ndarray:
        """float64 [M]. Two empty masks score 0: a referred target exists, so it was missed."""
        return self.intersection / np.maximum(self.union, 1)

    def metrics(self) -> dict[str, float]:
        """oIoU (sum I / sum U), mIoU (mean I/U) and P@X (share with I/U >= X), all in 0 .. 1.

        NaN for each where there is no sentence.
        """
        if not len(self):
            return dict.fromkeys(NAMES, float("nan"))
        iou = self.iou
        overall = self.intersection.sum() / max(self.union.sum(), 1)
        values = (overall, iou.mean(), *((iou >= x).mean() for x in THRESHOLDS))
        return {name: float(value) for name, value in zip(NAMES, values, strict=True)}

    def by_kind(self, kinds: Sequence[str]) -> dict[str, "Counts"]:
        """Splits the counts by the kind of their expressions, in alphabetical order.

        `kinds` names the kind of each of the M sentences; those without one ("") are left out.
        """
        kinds = np.asarray(kinds, dtype=object)
        return {kind: self.select(kinds == kind) for kind in sorted(set(kinds) - {""})}
