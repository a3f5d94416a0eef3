"""ResNet against `transformers`, and its own options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.resnet import ResNet, ResNetConfig
from refseg_jax.weights.resnet import RESNET, resnet_from_hf
from tests.parity.hf_models import arrays, redraw, relative_error

TINY = ResNetConfig(width=8, depths=(1, 2, 1))


def _reference(config: ResNetConfig) -> transformers.ResNetModel:
    return redraw(
        transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=config.width,
                hidden_sizes=config.widths,
                depths=config.depths,
                downsample_in_bottleneck=config.variant == "v1",
            )
        )
    )


def _reference_features(model: transformers.ResNetModel, image: np.ndarray):
    """The stem's and the stages' outputs, [B, h, w, C]."""
    outputs = model(torch.from_numpy(image).permute(0, 3, 1, 2), output_hidden_states=True)
    return [x.permute(0, 2, 3, 1) for x in outputs.hidden_states]


def _image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


class _ByStages(nn.Module):
    """What a model that works between the stages does."""

    config: ResNetConfig

    def setup(self):
        self.resnet = ResNet(self.config)

    def __call__(self, image, train=False):
        features = [self.resnet.embed(image, train)]
        for i in range(len(self.config.depths)):
            x = self.resnet.merge(i - 1, features[-1], train) if i else features[-1]
            features.append(self.resnet.stage(i, x, train))
        return features


def _inside(variables):
    return {name: {"resnet": tree} for name, tree in variables.items()}


@pytest.mark.parametrize(
    ("depths", "variant", "height", "width"),
    [
        ((2, 1, 3, 1), "v1.5", 64, 96),
        ((1, 2, 1, 2), "v1.5", 53, 87),  # odd after every stride
        ((1, 1, 2), "v1", 45, 70),
    ],
)
def test_features_of_every_stage(depths, variant, height, width):
    config = ResNetConfig(width=8, depths=depths, variant=variant)
    model = _reference(config)
    image = _image(height, width)
    variables = resnet_from_hf(arrays(model.state_dict()), config)
    ours = jax.jit(_ByStages(config).apply)(_inside(variables), image)
    whole = jax.jit(ResNet(config).apply)(variables, image)
    with torch.no_grad():
        theirs = _reference_features(model, image)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    errors += [relative_error(a, b) for a, b in zip(whole, theirs[1:], strict=True)]
    assert max(errors) <= 1e-4, errors
    assert tuple(x.shape[-1] for x in whole) == config.widths
    assert whole[0].shape[1] == -(-height // config.patch_size)


def test_training_records_the_batch():
    """Batch statistics normalise, and the running ones move, in every norm; blocks recomputed."""
    config = dataclasses.replace(TINY, remat=True)
    model = _reference(config)
    image = _image(45, 70)
    variables = resnet_from_hf(arrays(model.state_dict()), config)
    apply = functools.partial(ResNet(config).apply, train=True, mutable="batch_stats")
    names = [e.primitive.name for e in jax.make_jaxpr(apply)(variables, image).eqns]
    assert sum("checkpoint" in n or "remat" in n for n in names) == sum(config.depths)
    ours, updated = jax.jit(apply)(variables, image)
    with torch.no_grad():
        theirs = _reference_features(model.train(), image)[1:]
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors
    expected = resnet_from_hf(arrays(model.state_dict()), TINY)["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        updated["batch_stats"],
        expected,
    )


def test_frozen_statistics():
    """Training is then the program of evaluation."""
    variables = resnet_from_hf(arrays(_reference(TINY).state_dict()), TINY)
    resnet = ResNet(dataclasses.replace(TINY, frozen_stats=True))
    programs = {
        str(
            jax.make_jaxpr(functools.partial(resnet.apply, train=train, mutable="batch_stats"))(
                variables, _image(32, 40)
            )
        )
        for train in (False, True)
    }
    assert len(programs) == 1


def test_bfloat16_compute():
    variables = resnet_from_hf(arrays(_reference(TINY).state_dict()), TINY)
    image = _image(32, 32)
    full = jax.jit(ResNet(TINY).apply)(variables, image)
    half = jax.jit(ResNet(TINY, dtype=jnp.bfloat16).apply)(variables, image)
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.05 * np.abs(b).max()


def test_torchvision_spelling():
    state = arrays(_reference(TINY).state_dict())
    spelled = {RESNET.spelling(key): array for key, array in state.items()}
    shapes = {key: array.shape for key, array in spelled.items()}
    assert shapes["conv1.weight"] == (8, 3, 7, 7)
    assert shapes["bn1.running_var"] == (8,)
    assert shapes["layer1.0.downsample.0.weight"] == (32, 8, 1, 1)
    assert shapes["layer2.1.conv2.weight"] == (16, 16, 3, 3)
    assert shapes["layer2.1.bn3.weight"] == (64,)
    assert shapes["layer3.0.downsample.1.running_mean"] == (128,)
    spelled |= {"fc.weight": np.zeros((10, 128)), "fc.bias": np.zeros(10)}
    jax.tree.map(
        np.testing.assert_array_equal, resnet_from_hf(spelled, TINY), resnet_from_hf(state, TINY)
    )


def test_bad_input():
    state = arrays(_reference(TINY).state_dict())
    with pytest.raises(UserError, match=r"15 missing: layer2\.2\.bn1"):
        resnet_from_hf(state, dataclasses.replace(TINY, depths=(1, 3, 1)))
    with pytest.raises(UserError, match=r"'v2' is not one of v1\.5, v1, clip"):
        ResNetConfig(variant="v2")
