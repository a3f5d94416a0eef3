"""Scores from counts: hand-computed cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.metrics import Counts, overlap


def test_overlap_counts_pixels_in_numpy_and_jax():
    prediction = np.array([[[1, 1, 0]], [[0, 0, 0]]], bool)
    truth = np.array([[[0, 1, 1]], [[0, 1, 0]]], bool)
    for array in (np.asarray, jnp.asarray):
        intersection, union = overlap(array(prediction), array(truth))
        np.testing.assert_array_equal(intersection, [1, 0])
        np.testing.assert_array_equal(union, [3, 1])


def test_metrics_by_hand():
    # IoU 0.5, 0.6, 1, 0 (missed) and 0/0: a target exists, so an empty prediction scores 0.
    counts = Counts.from_rows([(0, 1, 2), (1, 3, 5), (2, 90, 90), (3, 0, 8), (4, 0, 0)])
    scores = counts.metrics()
    assert scores["oIoU"] == pytest.approx(94 / 105)
    assert scores["mIoU"] == pytest.approx((0.5 + 0.6 + 1) / 5)
    precision = [scores[f"P@{x}"] for x in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert precision == pytest.approx([3 / 5, 2 / 5, 1 / 5, 1 / 5, 1 / 5])


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
def test_precision_includes_the_threshold_itself(tenths):
    for scale in (1, 7, 1234567):
        counts = Counts.from_rows([(0, tenths * scale, 10 * scale)])
        assert counts.metrics()[f"P@0.{tenths}"] == 1


def test_rows_in_any_order_with_padding_give_the_same_scores():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 2**31, 100)
    rows = np.stack([np.arange(100), (union * rng.random(100)).astype(int), union], 1)
    padding = np.full((7, 3), -1)
    mixed = rng.permutation(np.concatenate([rows, padding]))
    assert Counts.from_rows(mixed).metrics() == Counts.from_rows(rows).metrics()
    with pytest.raises(ValueError, match="twice"):
        Counts.from_rows(np.concatenate([rows, rows[:1]]))


def test_sums_do_not_overflow():
    rows = [(i, 2**30, 2**31 - 1) for i in range(1000)]
    assert Counts.from_rows(rows).metrics()["oIoU"] == pytest.approx(0.5)


def test_by_kind():
    counts = Counts.from_rows([(0, 1, 1), (1, 0, 1), (2, 1, 2), (3, 1, 4)])
    parts = counts.by_kind(["place", "", "attribute", "place"])
    assert list(parts) == ["attribute", "place"]
    np.testing.assert_array_equal(parts["place"].index, [0, 3])
    assert parts["place"].metrics()["mIoU"] == pytest.approx(0.625)


def test_no_sentence_has_no_score():
    assert all(np.isnan(value) for value in Counts.from_rows([]).metrics().values())
