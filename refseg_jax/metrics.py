"""Pixel counts -> oIoU, mIoU and Precision@X; with expressions that fit nothing, gIoU and others.

Everything is computed from exact integer counts per sentence. Counts from several processes are
simply concatenated; the division comes last, so a score does not depend on how the sentences were
spread over batches or hosts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


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
    """Pixel counts of M sentences: five int64 [M] arrays.

    Attributes:
      index: number of the sentence in its source. Scores do not read it.
      intersection, union: of prediction and truth.
      predicted: pixels of the prediction.
      target: 1 if the expression means something in the image, 0 if it fits nothing. (A target
        may have no pixel left at a small input size.)
    """

    index: np.ndarray
    intersection: np.ndarray
    union: np.ndarray
    predicted: np.ndarray
    target: np.ndarray

    @classmethod
    def from_rows(cls, rows: Any) -> "Counts":
        """Rows of the five numbers, e.g. gathered from all processes, in any order.

        Padding rows (index < 0) are dropped and the rest is ordered by index. An index that
        comes twice is an error of the caller: ValueError.
        """
        rows = np.asarray(rows, np.int64).reshape(-1, len(dataclasses.fields(cls)))
        rows = rows[rows[:, 0] >= 0]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        if (np.diff(rows[:, 0]) == 0).any():
            raise ValueError("a sentence was counted twice")
        return cls(*rows.T)

    def __len__(self) -> int:
        return len(self.index)

    def select(self, chosen: np.ndarray) -> "Counts":
        """The sentences picked by a bool mask or an index array."""
        return Counts(*(array[chosen] for array in vars(self).values()))

    @property
    def iou(self) -> np.ndarray:
        """float64 [M]. Two empty masks score 0 if a target exists, for it was missed, else 1."""
        iou = self.intersection / np.maximum(self.union, 1)
        return np.where(self.target == 1, iou, self.predicted == 0)

    def metrics(self, generalized: bool = False) -> dict[str, float]:
        """Scores by name, all in 0 .. 1; NaN where there is no sentence that they are about.

        oIoU (sum I / sum U), mIoU (mean I/U) and P@X (share with I/U >= X). `generalized` ones are
        gRefCOCO's: gIoU (mean of `iou`), cIoU (sum I / sum U), N-acc (share of the sentences
        without a target whose prediction is empty), T-acc (share of those with one whose is not),
        and P@X, as ReLA's evaluation has it, over the sentences with a target.
        """
        iou, meant, pixels = self.iou, self.target == 1, self.union.sum()
        known = pixels > 0 or meant.any()
        overall = float(self.intersection.sum() / max(pixels, 1)) if known else float("nan")
        precision = {f"P@{x}": _mean(iou[meant] >= x) for x in THRESHOLDS}
        if not generalized:
            return {"oIoU": overall, "mIoU": _mean(iou), **precision}
        return {
            "gIoU": _mean(iou),
            "cIoU": overall,
            "N-acc": _mean(self.predicted[~meant] == 0),
            "T-acc": _mean(self.predicted[meant] > 0),
            **precision,
        }

    def by_kind(self, kinds: Sequence[str]) -> dict[str, "Counts"]:
        """Splits the counts by the kind of their expressions, in alphabetical order.

        `kinds` names the kind of each of the M sentences; those without one ("") are left out.
        """
        kinds = np.asarray(kinds, dtype=object)
        return {kind: self.select(kinds == kind) for kind in sorted(set(kinds) - {""})}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
