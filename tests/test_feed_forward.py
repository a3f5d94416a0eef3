"""A block's feed-forward half: the kernel for TPUs against XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.encoders.swin import SwinBlock
from refseg_jax.models.layers import feed_forward as module
from refseg_jax.models.layers.activations import gelu
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
C, HIDDEN = 128, 256


def examples(*shape):
    """A cotangent, x, factors of which one is 0, and the layers' parameters."""
    kept = np.where(np.arange(shape[0]) == 1, 0, 1.25).reshape(-1, *[1] * (len(shape) - 1))
    shapes = (C,), (C,), (C, HIDDEN), (HIDDEN,), (HIDDEN, C), (C,)
    parameters = [RNG.normal(size=s) / np.sqrt(s[0] if len(s) > 1 else 1) for s in shapes]
    arrays = RNG.normal(size=shape), 3 * RNG.normal(size=shape) + 1, kept, *parameters
    return [a.astype(np.float32) for a in arrays]


def with_gradients(function):
    def results(cotangent, *operands):
        y, pull_back = jax.vjp(function, *operands)
        return y, *pull_back(cotangent)

    return results


def test_gelu_by_tanh():
    x = jnp.linspace(-30, 30, 60001)
    g, slope = module.gelu_by_tanh(x)
    np.testing.assert_allclose(g, gelu(x), atol=3e-5)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(gelu))(x), atol=1.2e-4)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("width", [HIDDEN, HIDDEN // 2])
@pytest.mark.parametrize(
    "shape",
    [
        (4, 64, C),  # Two blocks of a sample, or one.
        (2, 6, 8, C),
        (2, 25, C),  # One, of no whole tiles.
    ],
)
def test_kernel(shape, devices, width, interpreted, monkeypatch):
    monkeypatch.setattr(module, "WIDTH", width)
    monkeypatch.setattr(module, "MOST_NUMBERS", 32 * width)
    arrays = examples(*shape)
    mesh = make_mesh(devices, 1)
    samples, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(a, samples if i < 3 else whole) for i, a in enumerate(arrays)]
    jax.clear_caches()  # Of blocks and parts of another size.
    ours = jax.jit(on_mesh(mesh, with_gradients(module.feed_in_kernel)))(*placed)
    y, of_x, _, *of_parameters = with_gradients(module.feed)(*arrays)
    np.testing.assert_allclose(ours[0], y, atol=2e-4)  # The error of GELU, times weights.
    np.testing.assert_allclose(ours[1], of_x, atol=5e-4)
    assert not ours[2].any()
    for a, b in zip(ours[3:], of_parameters, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() < 2e-4 * np.abs(b).max()


def test_rounding_is_that_of_bfloat16(interpreted):
    """The kernel, in bfloat16, is no farther from float32 than XLA's operations are."""
    arrays = examples(2, 32, C)
    small = [jnp.asarray(a, jnp.bfloat16) for a in arrays[:2]] + arrays[2:]
    exact = with_gradients(module.feed)(*(np.asarray(a, np.float32) for a in small))

    def errors(function):
        results = jax.jit(on_mesh(make_mesh(1, 1), with_gradients(function)))(*small)
        pairs = zip(results, exact, strict=True)
        return [np.abs(np.asarray(a, np.float32) - b).mean() for a, b in pairs]

    ours, xla = errors(module.feed_in_kernel), errors(module.feed)
    del ours[2], xla[2]
    assert all(a < 1.1 * b for a, b in zip(ours, xla, strict=True)), (ours, xla)


@pytest.mark.parametrize(
    ("shape", "dtype", "hidden", "fits"),
    [
        ((4, 14400, 128), jnp.bfloat16, 512, True),  # 36 blocks.
        ((4, 3136, 256), jnp.bfloat16, 1024, True),
        ((4, 14400, 128), jnp.float32, 512, False),
        ((4, 900, 512), jnp.bfloat16, 2048, False),  # Many channels.
        ((4, 14400, 96), jnp.bfloat16, 384, False),
        ((4, 3136, 256), jnp.bfloat16, 2048, False),  # Many in between.
        ((4, 11025, 128), jnp.bfloat16, 512, False),  # 105 x 105: no whole tiles.
        ((4, 16 * 487, 128), jnp.bfloat16, 512, False),  # Blocks of 16 rows.
        ((3, 14400, 128), jnp.bfloat16, 512, False),  # Three samples for two devices.
    ],
)
def test_what_fits_the_kernel(shape, dtype, hidden, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), lambda x: module.fits_kernel(x, hidden))(array) == fits
    assert not module.fits_kernel(array, hidden)  # It is not known where the samples are.


def test_a_block_takes_kernels_on_a_tpu(like_a_tpu):
    block = SwinBlock(4, 4, mlp_ratio=2.0, drop_path=0.5, dtype=jnp.bfloat16)
    x = jnp.ones((2, 64, C), jnp.bfloat16)
    variables = block.init(jax.random.key(0), x, (8, 8), 0, False)

    def jaxpr():
        apply = functools.partial(block.apply, size=(8, 8), shift=0, train=False)
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), apply))(variables, x))

    kernels = "name=feed_forward", "name=normed_dense"
    assert all(name in jaxpr() for name in kernels) and " erf " in jaxpr()
    like_a_tpu()
    assert all(name in jaxpr() for name in kernels) and " erf " not in jaxpr()
    assert "name=layer_norm" not in jaxpr()
