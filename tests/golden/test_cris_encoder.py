"""CLIP's encoders inside CRIS against the authors' released code, over every folder of outputs."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from refseg_jax.models.encoders.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from refseg_jax.weights.clip import clip_from_openai
from tests.golden.released import TOLERANCE, folders, relative_error

PREFIX = "backbone."


def _features(clip: Clip, image: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    """By the names of the released features."""
    x = clip.vision.embed(image)
    features = {"v.stem": x}
    for i in range(len(clip.config.vision.depths)):
        features[f"v.layer{i + 1}"] = x = clip.vision.stage(i, x)
    features["v.attnpool"] = clip.vision.pool(x)
    x = clip.text.embed(tokens)
    for i in range(clip.config.text.layers):
        features[f"t.block{i}_lnd"] = x = clip.text.layers(x, i, i + 1)
    features["t.ln_final_nld"], features["t.state"] = clip.text(tokens, tokens != 0)
    return features


def _ours(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoders' part of a released state, as CLIP names it."""
    return {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}


@pytest.fixture(scope="module", params=folders("cris"), ids=lambda folder: folder.name)
def case(request):
    """The folder, our encoders, the released state, and the inputs."""
    sizes = json.loads((request.param / "config.json").read_text())["clip"]
    config = ClipConfig(
        ClipVisionConfig(
            width=sizes["vision_width"],
            depths=tuple(sizes["vision_layers"]),
            embed_dim=sizes["embed_dim"],
            pool_grid=sizes["image_resolution"] // 32,
        ),
        ClipTextConfig(
            vocab_size=sizes["vocab_size"],
            hidden=sizes["transformer_width"],
            layers=sizes["transformer_layers"],
            heads=sizes["transformer_heads"],
            max_positions=sizes["context_length"],
            embed_dim=sizes["embed_dim"],
        ),
    )
    state = _ours(load_file(request.param / "state.safetensors"))
    inputs = np.load(request.param / "inputs.npz")
    image, tokens = inputs["image"].transpose(0, 2, 3, 1), inputs["tokens"].astype(np.int32)
    # The last real token is the one with the largest id: the end mark.
    np.testing.assert_array_equal((tokens != 0).sum(1) - 1, tokens.argmax(1))
    return request.param, Clip(config), state, image, tokens


def test_features(case):
    folder, clip, state, image, tokens = case
    variables = clip_from_openai(state, clip.config)
    apply = functools.partial(clip.apply, method=_features)
    ours = jax.jit(apply)(variables, image, tokens)
    theirs = np.load(folder / "eval_features.npz")
    assert set(ours) == {name for name in theirs if name.startswith(("v.", "t."))}
    errors = {name: relative_error(_like(x, name), theirs[name]) for name, x in ours.items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_running_statistics_after_a_step(case):
    folder, clip, state, image, tokens = case
    variables = clip_from_openai(state, clip.config)
    apply = functools.partial(clip.apply, train=True, mutable="batch_stats")
    _, updated = jax.jit(apply)(variables, image, tokens, tokens != 0)
    after = dict(np.load(folder / "train_nodrop.npz"))
    after = _ours({name.removeprefix("bn_after."): array for name, array in after.items()})
    assert set(after) == {name for name in state if "running_" in name}
    expected = clip_from_openai({**state, **after}, clip.config)["batch_stats"]
    errors = jax.tree.map(relative_error, updated["batch_stats"], expected)
    assert max(jax.tree.leaves(errors)) < TOLERANCE, errors


def _like(ours: jax.Array, name: str) -> np.ndarray:
    """In the released layout: images [B, C, h, w], words [T, B, D] inside the transformer."""
    ours = np.asarray(ours)
    if ours.ndim == 4:
        return ours.transpose(0, 3, 1, 2)
    return ours.transpose(1, 0, 2) if name.endswith("_lnd") else ours
