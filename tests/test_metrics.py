"""Scores from counts: hand-computed cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.metrics import Counts, overlap


def count(rows):
    """Counts of found targets from rows of index, intersection and union."""
    return Counts.from_rows([(*row, 1, 1) for row in rows])


def test_overlap_counts_pixels_in_numpy_and_jax():
    prediction = np.array([[[1, 1, 0]], [[0, 0, 0]]], bool)
    truth = np.array([[[0, 1, 1]], [[0, 1, 0]]], bool)
    for array in (np.asarray, jnp.asarray):
        intersection, union = overlap(array(prediction), array(truth))
        np.testing.assert_array_equal(intersection, [1, 0])
        np.testing.assert_array_equal(union, [3, 1])


def test_metrics_by_hand():
    # IoU 0.5, 0.6, 1, 0 (missed) and 0/0: a target exists, so an empty prediction scores 0.
    scores = count([(0, 1, 2), (1, 3, 5), (2, 90, 90), (3, 0, 8), (4, 0, 0)]).metrics()
    assert list(scores) == ["oIoU", "mIoU", "P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9"]
    assert scores["oIoU"] == pytest.approx(94 / 105)
    assert scores["mIoU"] == pytest.approx((0.5 + 0.6 + 1) / 5)
    precision = [scores[f"P@{x}"] for x in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert precision == pytest.approx([3 / 5, 2 / 5, 1 / 5, 1 / 5, 1 / 5])


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
def test_precision_includes_the_threshold_itself(tenths):
    for scale in (1, 7, 1234567):
        counts = count([(0, tenths * scale, 10 * scale)])
        assert counts.metrics()[f"P@0.{tenths}"] == 1


def test_rows_in_any_order_with_padding_give_the_same_scores():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 2**31, 100)
    intersection, some = (union * rng.random(100)).astype(int), np.arange(100) % 3 > 0
    rows = np.stack([np.arange(100), intersection, union, intersection, some], 1)
    padding = np.full((7, 5), -1)
    mixed = rng.permutation(np.concatenate([rows, padding]))
    for generalized in (False, True):
        scores = Counts.from_rows(mixed).metrics(generalized)
        assert scores == Counts.from_rows(rows).metrics(generalized)
    with pytest.raises(ValueError, match="twice"):
        Counts.from_rows(np.concatenate([rows, rows[:1]]))


def test_sums_do_not_overflow():
    rows = [(i, 2**30, 2**31 - 1) for i in range(1000)]
    assert count(rows).metrics()["oIoU"] == pytest.approx(0.5)


def test_by_kind():
    counts = count([(0, 1, 1), (1, 0, 1), (2, 1, 2), (3, 1, 4)])
    parts = counts.by_kind(["place", "", "attribute", "place"])
    assert list(parts) == ["attribute", "place"]
    np.testing.assert_array_equal(parts["place"].index, [0, 3])
    assert parts["place"].metrics()["mIoU"] == pytest.approx(0.625)


def test_no_sentence_has_no_score():
    for generalized in (False, True):
        scores = Counts.from_rows([]).metrics(generalized)
        assert all(np.isnan(value) for value in scores.values())


def generalized_by_loop(pairs):
    """gRefCOCO's scores of (prediction, truth, has a target), one sentence at a time."""
    ious, found, left_empty, sums = [], [], [], np.zeros(2)
    for prediction, truth, target in pairs:
        i = u = 0
        for p, t in zip(prediction.flat, truth.flat, strict=True):
            i, u = i + (p and t), u + (p or t)
        sums += i, u
        if target:
            found.append(prediction.any())
            ious.append((True, i / u if u else 0))
        else:
            left_empty.append(not prediction.any())
            ious.append((False, float(left_empty[-1])))
    scores = {
        "gIoU": np.mean([iou for _, iou in ious]),
        "cIoU": sums[0] / sums[1],
        "N-acc": np.mean(left_empty),
        "T-acc": np.mean(found),
    }
    hits = [iou for target, iou in ious if target]
    return scores | {f"P@0.{x}": np.mean([iou >= x / 10 for iou in hits]) for x in range(5, 10)}


def test_generalized_scores_against_a_slow_loop():
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(60):
        truth = rng.random((5, 6)) < rng.choice([0.3, 0.7])
        prediction = truth ^ (rng.random((5, 6)) < rng.choice([0, 0.1, 0.3]))
        target = k % 3 > 0
        pairs.append((prediction & (k % 4 > 0), truth & target, target))
    pairs.append((np.zeros((5, 6), bool), np.zeros((5, 6), bool), True))  # Lost by a resize.
    pairs.append((truth := np.eye(5, 6, dtype=bool), ~truth, True))  # Found, but elsewhere.
    rows = [
        (j, *overlap(prediction, truth), prediction.sum(), target)
        for j, (prediction, truth, target) in enumerate(pairs)
    ]
    scores = Counts.from_rows(rows).metrics(generalized=True)
    expected = generalized_by_loop(pairs)
    assert list(scores) == list(expected) and all(0 < value < 1 for value in scores.values())
    assert scores == pytest.approx(expected)


def test_scores_about_no_sentence_are_no_numbers():
    right, wrong, target = (0, 0, 0, 0, 0), (1, 0, 7, 7, 0), (2, 0, 4, 0, 1)
    scores = Counts.from_rows([right]).metrics(generalized=True)
    assert scores["gIoU"] == scores["N-acc"] == 1
    assert all(np.isnan(scores[name]) for name in ("cIoU", "T-acc", "P@0.5"))
    scores = Counts.from_rows([right, wrong]).metrics(generalized=True)
    assert (scores["gIoU"], scores["cIoU"], scores["N-acc"]) == (0.5, 0, 0.5)
    scores = Counts.from_rows([target]).metrics(generalized=True)
    assert scores["gIoU"] == scores["T-acc"] == scores["P@0.5"] == 0 and np.isnan(scores["N-acc"])
