"""Which device holds what of a train state; that training agrees is in test_train and beside it."""

import jax
import jax.numpy as jnp
import optax
import pytest

from refseg_jax.errors import UserError
from refseg_jax.sharding import make_mesh, state_sharding
from refseg_jax.train_state import init_state

PARAMS = {
    "wide": jnp.zeros((8, 64)),
    "odd": jnp.zeros((6, 65)),
    "small": jnp.zeros(8),
}


def places(data, fsdp, rules=(), stored=True):
    """(of the parameters, of their first moments), each name -> the axes of its sharding."""
    state = init_state({"params": PARAMS}, lambda _: optax.adam(0.1), jax.random.key(0), False)
    shardings = state_sharding(state, make_mesh(data, fsdp), rules, min_size=64, stored=stored)
    return [
        {name: tuple(sharding.spec) for name, sharding in tree.items()}
        for tree in (shardings.params, shardings.opt_state[0].mu)
    ]


@pytest.mark.parametrize(("data", "fsdp", "axis"), [(4, 1, "data"), (1, 4, "fsdp")])
def test_devices_share_the_state(data, fsdp, axis):
    params, moments = places(data, fsdp)
    assert params == moments == {"wide": (None, axis), "odd": (), "small": ()}


def test_a_step_has_its_parameters_whole():
    """But for what is split over "fsdp", or by a rule."""
    assert places(4, 1, stored=False)[0] == dict.fromkeys(PARAMS, ())
    assert places(2, 4, stored=False)[0] == {"wide": (None, "fsdp"), "odd": (), "small": ()}
    rules = [("wide", ("data", None))]
    whole = {"wide": ("data", None), "odd": (), "small": ()}
    assert places(2, 1, rules, stored=False)[0] == whole


def test_moments_lie_where_their_parameters_do():
    params, moments = places(2, 4)
    assert params == moments == {"wide": (None, "fsdp"), "odd": (), "small": ()}


def test_the_first_rule_that_fits_wins():
    rules = [("opt_state/.*/wide", ()), ("wide|odd", ("data", None)), ("odd", ("fsdp", None))]
    params, moments = places(2, 1, rules)
    assert params == {"wide": ("data", None), "odd": ("data", None), "small": ()}
    assert moments == {"wide": (), "odd": ("data", None), "small": ()}


@pytest.mark.parametrize(
    "rule", [("(", ("data",)), ("wide",), ("wide", ("nope",)), ("wide", (None, None, "data"))]
)
def test_a_rule_that_is_none_is_named(rule):
    with pytest.raises(UserError, match="config.mesh.rules: "):
        places(2, 1, (rule,))


def test_a_rule_that_places_nothing_is_named():
    rules = [("odd", ("data", None)), ("wid$", ("data", None))]
    with pytest.raises(UserError, match=r"\('wid\$', .* such as params/odd"):
        places(2, 1, rules)
    # What is no whole state need not have it.
    assert places(2, 1, rules, stored=False)[0] == {"wide": (), "odd": ("data", None), "small": ()}


def test_one_device_holds_everything():
    for tree in places(1, 1):
        assert tree == dict.fromkeys(PARAMS, ())
