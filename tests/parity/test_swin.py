"""Swin against `transformers`, and its own options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.models.layers.windows import Windows, gather_windows
from refseg_jax.weights.hf import swin_from_hf
from tests.parity.hf_models import arrays, random_params, redraw, relative_error

TINY = SwinConfig(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window=3, drop_path=0.5)


def _reference(config: SwinConfig) -> transformers.SwinModel:
    return redraw(
        transformers.SwinModel(
            transformers.SwinConfig(
                embed_dim=config.embed_dim,
                depths=config.depths,
                num_heads=config.num_heads,
                window_size=config.window,
                mlp_ratio=config.mlp_ratio,
            ),
            add_pooling_layer=False,
        )
    )


def _reference_features(model: transformers.SwinModel, config: SwinConfig, image: np.ndarray):
    """Stage outputs before merging, [B, h, w, C]."""
    outputs = model(
        torch.from_numpy(image).permute(0, 3, 1, 2),
        always_partition=config.shift_small_maps,
        output_hidden_states=True,
        output_hidden_states_before_downsampling=True,
    )
    return [x.permute(0, 2, 3, 1) for x in outputs.reshaped_hidden_states[1:]]


def _image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("window", "depths", "height", "width", "shift_small_maps"),
    [
        (7, (2, 2, 2, 2), 112, 140, True),
        (7, (1, 3, 2), 97, 133, True),  # pads patches, windows and merging; odd depths
        (12, (2, 2, 2, 2), 190, 102, True),  # the last maps are smaller than the window
        (4, (2, 2, 2), 64, 96, False),  # the last map is one window high
        (3, (2, 2, 2), 45, 51, True),
    ],
)
def test_features_of_every_stage(window, depths, height, width, shift_small_maps):
    config = SwinConfig(
        embed_dim=16,
        depths=depths,
        num_heads=(1, 2, 4, 8)[: len(depths)],
        window=window,
        shift_small_maps=shift_small_maps,
    )
    model = _reference(config)
    image = _image(height, width)
    params = swin_from_hf(arrays(model.state_dict()), config)
    ours = jax.jit(Swin(config).apply)({"params": params}, image)
    with torch.no_grad():
        theirs = _reference_features(model, config, image)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors


def test_gradients():
    model = _reference(TINY)
    image = _image(29, 38)
    params = swin_from_hf(arrays(model.state_dict()), TINY)
    theirs = _reference_features(model, TINY, image)
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in theirs]
    torch.autograd.backward(theirs, cotangents)
    their_grads = swin_from_hf(
        arrays({name: p.grad for name, p in model.named_parameters() if p.grad is not None}), TINY
    )

    def loss(params):
        ours = Swin(TINY).apply({"params": params}, image)
        return sum(jnp.vdot(x, c.numpy()) for x, c in zip(ours, cotangents, strict=True))

    grads = jax.jit(jax.grad(loss))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        grads,
        their_grads,
    )


class _ByStages(nn.Module):
    """What a model that works between the stages does."""

    def setup(self):
        self.swin = Swin(TINY)

    def __call__(self, image):
        x = self.swin.stage(0, self.swin.embed(image))
        return [x, self.swin.stage(1, self.swin.merge(0, x))]


def test_stage_by_stage_is_the_whole():
    image = _image(32, 32)
    params = random_params(_ByStages(), image)
    stages = jax.jit(_ByStages().apply)({"params": params}, image)
    whole = jax.jit(Swin(TINY).apply)({"params": params["swin"]}, image)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stages, whole)


@pytest.mark.parametrize("whole_map", [1024, 0], ids=["whole", "strips"])
def test_a_tpu_moves_cells_by_products(whole_map, like_a_tpu, monkeypatch):
    monkeypatch.setattr("refseg_jax.models.layers.windows._WHOLE_MAP", whole_map)
    config = dataclasses.replace(TINY, depths=(2, 2), window=4)
    image = _image(28, 44)
    params = random_params(Swin(config), image)

    def loss(params, image):
        return sum(jnp.mean(x**2) for x in Swin(config).apply({"params": params}, image))

    def value_and_gradients():
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, image)

    by_moves = value_and_gradients()
    like_a_tpu()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        by_moves,
        value_and_gradients(),
    )
    windows = Windows((7, 11), 4, 2)
    jaxpr = jax.make_jaxpr(lambda x: gather_windows(x, windows))(jnp.ones((1, 77, 3)))
    assert "dot_general" in str(jaxpr)


def test_remat_changes_memory_only():
    config = dataclasses.replace(TINY, depths=(2,), num_heads=(1,))
    image = _image(24, 28)
    params = random_params(Swin(config), image)

    def loss(params, config):
        rngs = {"dropout": jax.random.key(1)}
        features = Swin(config).apply({"params": params}, image, train=True, rngs=rngs)
        return sum(jnp.mean(x**2) for x in features)

    def recomputed(config):
        jaxpr = jax.make_jaxpr(lambda p: loss(p, config))(params)
        return sum(
            "checkpoint" in e.primitive.name or "remat" in e.primitive.name for e in jaxpr.eqns
        )

    remat = dataclasses.replace(config, remat=True)
    assert (recomputed(config), recomputed(remat)) == (0, 2)
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        value_and_grad(params, config),
        value_and_grad(params, remat),
    )


def test_stochastic_depth_drops_whole_samples():
    config = dataclasses.replace(TINY, depths=(2,), num_heads=(1,), drop_path=1.0)
    image = _image(24, 24)
    variables = {"params": random_params(Swin(config), image)}

    def stage(depth, **kwargs):
        one = Swin(dataclasses.replace(config, depths=(depth,)))
        return one.apply(variables, image, **kwargs)[0]

    # The rates are 0 for the first block and 1 for the last: the last block is skipped.
    dropped = stage(2, train=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(dropped, stage(1))
    assert not np.allclose(dropped, stage(2))


def test_bfloat16_compute():
    image = _image(24, 24)
    params = random_params(Swin(TINY), image)
    full = jax.jit(Swin(TINY).apply)({"params": params}, image)
    half = jax.jit(Swin(TINY, dtype=jnp.bfloat16).apply)({"params": params}, image)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.03 * np.abs(b).max()
