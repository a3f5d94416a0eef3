"""Squares of pixels in channels: layers of them against the same layers of pixels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models import jmceln
from refseg_jax.models.encoders import darknet, resnet
from refseg_jax.models.jmceln import Upsampling
from refseg_jax.models.layers.conv import ConvNorm, convolve
from refseg_jax.models.layers.decoder import class_difference
from refseg_jax.models.layers.resize import doubled_conv, resized_conv
from refseg_jax.models.layers.squares import image_to_squares, kernel_of_squares, mean_of_squares
from refseg_jax.sharding import make_mesh, on_mesh, on_tpus


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def to_squares(x, side):
    B, H, W, C = x.shape
    x = x.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // side, W // side, side * side * C)


def from_squares(x, side):
    B, h, w, _ = x.shape
    x = x.reshape(B, h, w, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * h, side * w, -1)


def close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def with_gradients(function, *arguments):
    """`function`'s result, and gradients that all of its numbers reach."""

    def loss(*arguments):
        y = function(*arguments)
        return jnp.sin(y).sum(), y

    step = jax.value_and_grad(loss, tuple(range(len(arguments))), has_aux=True)
    (_, y), gradients = jax.jit(step)(*arguments)
    return y, gradients


@pytest.mark.parametrize("on_tpu", [False, True])
@pytest.mark.parametrize("width", [32, 44, 12])  # 8 and 11 patches side by side; too few.
def test_squares_of_an_image(width, on_tpu, like_a_tpu):
    """They have their pixels row by row."""
    if on_tpu:
        like_a_tpu()
    image = normal(2, 8, width, 3)
    ours, theirs = (
        with_gradients(lambda x, f=f: f(x, 4), image) for f in (image_to_squares, to_squares)
    )
    close(ours, theirs)
    row, column = 2, 1
    np.testing.assert_array_equal(ours[0][..., 27:30], image[:, row::4, column::4])


@pytest.mark.parametrize(("w", "channels"), [(4, 5), (6, 5), (4, 80)])  # Pairs, or none.
def test_mean_of_squares(w, channels):
    x = normal(2, 6, w, channels)
    theirs = x.reshape(2, 3, 2, w // 2, 2, channels).mean((2, 4))
    np.testing.assert_allclose(mean_of_squares(to_squares(x, 2), 2), theirs, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize(("side", "stride"), [(2, 1), (2, 2), (3, 1), (4, 2), (4, 4)])
def test_convolution_of_squares(side, stride, size):
    x, kernel = normal(2, 3 * side, 4 * side, 3), normal(size, size, 3, 5, seed=1)

    def of_squares(x, kernel):
        kernel, around = kernel_of_squares(kernel, side, stride)
        return from_squares(convolve(to_squares(x, side), kernel, 1, around), side // stride)

    def of_pixels(x, kernel):
        return convolve(x, kernel, stride, (size // 2, size // 2))

    close(with_gradients(of_squares, x, kernel), with_gradients(of_pixels, x, kernel))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("side", [(1, 2), (2, 1)])
def test_convolution_of_pairs(side, size):
    """A row's pixels side by side, or a column's."""
    x, kernel = normal(2, 4, 6, 3), normal(size, size, 3, 5, seed=1)
    rows, columns = side

    def to_pairs(x):
        B, h, w, C = x.shape
        x = x.reshape(B, h // rows, rows, w // columns, columns, C)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, h // rows, w // columns, 2 * C)

    def of_pairs(x, kernel):
        kernel, around = kernel_of_squares(kernel, side, 1)
        return convolve(to_pairs(x), kernel, 1, around)

    def of_pixels(x, kernel):
        return to_pairs(convolve(x, kernel, 1, (size // 2, size // 2)))

    close(with_gradients(of_pairs, x, kernel), with_gradients(of_pixels, x, kernel))


@pytest.mark.parametrize("stride", [1, 2])
def test_norm_of_squares(stride):
    """By all pixels of the batch; the recorded statistics are those of pixels, too."""
    layer = ConvNorm(6, 3, stride, jax.nn.relu)
    x = normal(4, 8, 12, 5) + np.arange(5)
    variables = layer.init(jax.random.key(0), x, True)
    variables = jax.tree.map(lambda a: a + 0.1 * normal(*a.shape), variables)

    def of_squares(x, variables, **how):
        return layer.apply(variables, to_squares(x, 2), squares=2, **how)

    ours, statistics = of_squares(x, variables, train=True, mutable="batch_stats")
    theirs, expected = layer.apply(variables, x, train=True, mutable="batch_stats")
    close((from_squares(ours, 2 // stride), statistics), (theirs, expected))
    close(
        from_squares(of_squares(x, variables, train=False), 2 // stride),
        layer.apply(variables, x, train=False),
    )


ENCODERS = {
    "clip": resnet.ResNet(resnet.ResNetConfig(width=8, depths=(1,), variant="clip")),
    "darknet": darknet.DarkNet(darknet.DarkNetConfig(width=4, depths=(1,), remat=True)),
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
def test_an_encoder_begins_with_squares_on_a_tpu(encoder, monkeypatch):
    image = normal(2, 32, 40, 3)
    variables = encoder.init(jax.random.key(0), image)

    def embed(variables, image):
        return encoder.apply(variables, image, True, method="embed", mutable="batch_stats")

    def has_maps():
        """But the image, of its size or half of it."""
        jaxpr = jax.make_jaxpr(lambda *a: embed(*a))(variables, image)  # Traced anew.
        return re.search(r"\[2,(32,40|16,20),(?!3\])", str(jaxpr))

    theirs = embed(variables, image)
    assert has_maps()
    for module in resnet, darknet:
        monkeypatch.setattr(module, "on_tpus", lambda: True)
    assert not has_maps()
    close(embed(variables, image), theirs)
    odd = image[:, :31, :39]  # No whole squares.
    ours = embed(variables, odd)
    monkeypatch.undo()
    close(ours, embed(variables, odd))


@pytest.mark.parametrize(("width", "pairs"), [(40, True), (36, False)])  # 10 pixels in a row; 9.
def test_a_first_stage_of_pairs_on_a_tpu(width, pairs, monkeypatch):
    encoder = resnet.ResNet(resnet.ResNetConfig(width=8, depths=(2, 1), variant="clip"))
    image = normal(2, 32, width, 3)
    variables = encoder.init(jax.random.key(0), image)

    def trained(params):
        maps, statistics = encoder.apply(
            {**variables, "params": params}, image, True, mutable="batch_stats"
        )
        return sum((x * normal(*x.shape)).mean() for x in maps), (maps, statistics)

    def all_of_it():
        step = jax.jit(jax.value_and_grad(lambda params: trained(params), has_aux=True))
        evaluated = jax.jit(lambda variables: encoder.apply(variables, image))(variables)
        return step(variables["params"]), evaluated

    theirs = all_of_it()
    monkeypatch.setattr(resnet, "on_tpus", lambda: True)
    of_pairs = f"[2,8,{width // 8},16]"  # Of the 8 channels inside of a bottleneck.
    assert (of_pairs in str(jax.make_jaxpr(lambda: all_of_it())())) == pairs
    for a, b in zip(jax.tree.leaves(all_of_it()), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("size", [(6, 10), (3, 2), (1, 5), (1, 1)])
def test_doubled_conv(size):
    x, kernel = normal(2, *size, 4), normal(3, 3, 4, 5, seed=1)
    doubled = tuple(2 * n for n in size)

    def ours(x, kernel):
        return from_squares(doubled_conv(x, kernel), 2)

    theirs = with_gradients(lambda *a: resized_conv(*a, doubled), x, kernel)
    close(with_gradients(ours, x, kernel), theirs)
    in_bfloat16 = ours(x.astype(jnp.bfloat16), kernel)
    assert in_bfloat16.dtype == jnp.bfloat16
    largest = float(jnp.abs(theirs[0]).max())
    np.testing.assert_allclose(in_bfloat16.astype(jnp.float32), theirs[0], atol=1e-2 * largest)


@pytest.mark.parametrize("side", [2, 3])
def test_class_difference_of_squares(side):
    x, kernel, bias = normal(2, 2 * side, 3 * side, 8), normal(8, 2, seed=1), normal(2, seed=2)

    def ours(x, kernel, bias):
        return class_difference(to_squares(x, side), kernel, bias, side)

    close(with_gradients(ours, x, kernel, bias), with_gradients(class_difference, x, kernel, bias))


@pytest.mark.parametrize("doublings", [0, 1, 2])
def test_an_upsampling_ends_with_squares_on_a_tpu(doublings, monkeypatch):
    x, size, decoder = normal(2, 3, 5, 16), (24, 40), Upsampling(doublings)
    variables = decoder.init(jax.random.key(0), x, size, True)
    shapes = jax.tree.map(jnp.shape, variables)
    variables = jax.tree.map(lambda x: jnp.abs(normal(*x.shape, seed=x.size)) / 4, variables)

    def trained(params, x):
        return decoder.apply({**variables, "params": params}, x, size, True, mutable="batch_stats")

    def all_of_it():
        logits, gradients = with_gradients(lambda *a: trained(*a)[0], variables["params"], x)
        _, statistics = jax.jit(lambda *a: trained(*a))(variables["params"], x)
        evaluated = jax.jit(lambda *a: decoder.apply(*a, size, False))(variables, x)
        return evaluated, logits, gradients, statistics

    def has_largest_map():
        jaxpr = jax.make_jaxpr(lambda: all_of_it())()  # Traced anew.
        h, w = (n * 2**doublings for n in x.shape[1:3])
        return re.search(rf"\[2,{h},{w},\d", str(jaxpr))

    theirs = all_of_it()
    assert has_largest_map()
    monkeypatch.setattr(jmceln, "on_tpus", lambda: True)
    assert bool(has_largest_map()) == (not doublings)
    close(all_of_it(), theirs)
    assert jax.tree.map(jnp.shape, decoder.init(jax.random.key(0), x, size, True)) == shapes


def test_a_cpu_is_no_tpu():
    assert not on_tpus() and not on_mesh(make_mesh(2, 1), on_tpus)()
