import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import alignformer
from refseg_jax.errors import UserError
from refseg_jax.optim import assign_groups, frozen_at_random, make_optimizer, make_schedule

PARAMS = {
    "norm": {"scale": jnp.ones(3)},
    "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
}


def config(**changes):
    optim = alignformer.get_config("refcoco").optim
    optim.update(changes)
    return optim


def test_poly_schedule_is_the_papers():
    schedule = make_schedule(config(), 1000)
    for step in (0, 1, 500, 999):
        np.testing.assert_allclose(schedule(step), 5e-5 * (1 - step / 1000) ** 0.9, rtol=1e-4)


def test_warmup_then_decay_and_constant_end():
    schedule = make_schedule(config(warmup_steps=10, decay_steps=100, end_lr=1e-5), 1000)
    np.testing.assert_allclose(schedule(5), 2.5e-5, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 5e-5, rtol=1e-6)
    np.testing.assert_allclose([schedule(100), schedule(999)], 1e-5, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["poly", "cosine", "step", "constant"])
def test_a_rate_of_zero(schedule):
    assert make_schedule(config(lr=0.0, schedule=schedule), 10)(3) == 0


def test_cosine_and_step():
    cosine, step = (
        make_schedule(config(schedule=kind, lr=1e-3, end_lr=1e-4, decay_share=0.5), 200)
        for kind in ("cosine", "step")
    )
    for k in (0, 25, 50, 75, 100, 150):
        share = min(k / 100, 1)
        expected = 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * share))
        np.testing.assert_allclose(cosine(k), expected, rtol=1e-5)
        np.testing.assert_allclose(step(k), 1e-3 if k < 100 else 1e-4, rtol=1e-5)


def test_long_gradients_are_clipped():
    updates = []
    for scale in (1e2, 1e4):
        # A large epsilon, so that Adam does not take the length away again.
        tx, _ = make_optimizer(config(clip_norm=1.0, eps=1.0), PARAMS, 100)
        grads = jax.tree.map(lambda x, scale=scale: jnp.full_like(x, scale), PARAMS)
        updates.append(tx.update(grads, tx.init(PARAMS), PARAMS)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *updates)


def test_what_is_frozen_has_no_part_in_clipping():
    groups = ((r"^norm", 0.0, 0.0), (r"", 1.0, 0.0))
    updates = []
    for scale in (1.0, 1e6):
        # A large epsilon, so that Adam does not take the length away again.
        tx, _ = make_optimizer(config(clip_norm=1.0, eps=1.0, groups=groups), PARAMS, 100)
        grads = {
            "norm": {"scale": jnp.full(3, scale)},
            "dense": jax.tree.map(jnp.ones_like, PARAMS["dense"]),
        }
        updates.append(tx.update(grads, tx.init(PARAMS), PARAMS)[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)
    assert not updates[0]["norm"]["scale"].any() and updates[0]["dense"]["bias"].all()


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(UserError, match="warmup_steps=10"):
        make_schedule(config(warmup_steps=10), 10)
    schedule = make_schedule(config(warmup_steps=10, schedule="constant"), 10)
    assert schedule(20) == np.float32(config().lr)  # It never decays.


def test_first_matching_group_wins_and_covers_each_parameter_once():
    groups = ((r"^norm/", 0.0, 0.0), (r"bias$", 1.0, 0.0), (r"", 0.5, 1.0))
    assert assign_groups(PARAMS, groups) == {
        "norm": {"scale": 0},
        "dense": {"kernel": 2, "bias": 1},
    }


@pytest.mark.parametrize(
    "groups, message",
    [
        (((r"bias$", 1, 1),), "dense/kernel"),
        (((r"", 1, 1), (r"never", 1, 1)), "never"),
        (((r"", 1),), "each is .path regex"),
        (((r"(", 1, 1),), "each is .path regex"),
        (((r"", "x", 1),), "each is .path regex"),
        (((r"", -1, 1),), "less than 0"),
        ((r"a", 1.0, 0.0), "each is .path regex"),
    ],
)
def test_uncovered_parameter_and_unused_group_are_errors(groups, message):
    with pytest.raises(UserError, match=message):
        assign_groups(PARAMS, groups)


def test_groups_scale_rate_and_decay():
    """With zero gradients AdamW moves a parameter by -lr * decay * value, and by nothing else."""
    groups = ((r"scale", 1.0, 0.0), (r"bias", 0.0, 1.0), (r"kernel", 0.5, 2.0))
    tx, _ = make_optimizer(config(lr=0.1, weight_decay=0.01, groups=groups), PARAMS, 100)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["norm"]["scale"], 0.0)
    np.testing.assert_allclose(updates["dense"]["bias"], 0.0)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * 0.5 * 0.01 * 2, rtol=1e-5)


def test_what_is_frozen_and_not_loaded_is_found():
    groups = ((r"^dense/kernel", 0.0, 0.0), (r"scale", 0.0, 0.0), (r"", 1.0, 1.0))
    found = frozen_at_random(PARAMS, {}, groups)
    assert found == {"dense/kernel": PARAMS["dense"]["kernel"].size}  # A norm's scale is no draw.
    assert not frozen_at_random(PARAMS, {"dense": {"kernel": 0}}, groups)
    assert not frozen_at_random(PARAMS, {}, ((r"", 1.0, 1.0),))
