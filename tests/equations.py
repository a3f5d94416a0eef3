"""What the tests that write a paper's equations as slow loops share."""

import functools

import jax
import numpy as np

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def randomise(tree):
    """No parameter or running statistic keeps an initial 0 or 1 that would hide a mistake."""
    return jax.tree.map(lambda x: x + 0.3 * np.abs(normal(*x.shape)), tree)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def linear(x, layer):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer.get("bias", 0.0))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def init(module, *arguments, **static):
    return jax.jit(functools.partial(module.init, **static))(jax.random.key(0), *arguments)


def apply(module, variables, *arguments, **static):
    return jax.jit(functools.partial(module.apply, **static))(variables, *arguments)


def draw(module, *arguments, **static):
    """Variables of `module`, all random, without compiling what initialises them."""
    shapes = jax.eval_shape(functools.partial(module.init, **static), jax.random.key(0), *arguments)

    def leaf(path, shape):
        name = path[-1].key
        if name == "kernel":
            return normal(*shape.shape) / np.sqrt(np.prod(shape.shape[:-1])).astype(np.float32)
        # Scales and variances stay away from 0.
        return (name in ("scale", "var")) + 0.3 * np.abs(normal(*shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes)
