"""Patch embedding against Flax's convolution, and as a TPU computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from refseg_jax.models.layers.patches import PatchEmbedding


def results(layer, image):
    rng = np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(4, 4, 3, 8)), "bias": rng.normal(size=8)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def loss(params, image):
        y = layer.apply({"params": params}, image)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, image)
    return y, *jax.tree.leaves(gradients)


# Three groups of 24, two of 20; ten and a part of one; 29, which have no divisor.
@pytest.mark.parametrize("width", [288, 160, 43, 116])
@pytest.mark.parametrize("on_tpu", [False, True])
def test_patches(width, on_tpu, like_a_tpu):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 14, width, 3)), jnp.float32)
    theirs = results(nn.Conv(8, (4, 4), (4, 4), padding="VALID"), image)
    if on_tpu:
        like_a_tpu()
    ours = results(PatchEmbedding(8, 4), image)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "convolutions"), [(288, 0), (116, 1)])
def test_a_tpu_has_no_convolution(width, convolutions, like_a_tpu):
    like_a_tpu()
    image = jnp.ones((2, 16, width, 3))
    layer = PatchEmbedding(8, 4)
    variables = jax.eval_shape(layer.init, jax.random.key(0), image)
    jaxpr = str(jax.make_jaxpr(layer.apply)(variables, image))
    assert jaxpr.count("conv_general_dilated[") == convolutions
