"""DarkNet-53 against a literal module, its file format, and its own options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.darknet import DarkNet, DarkNetConfig
from refseg_jax.weights.darknet import darknet_from_file
from refseg_jax.weights.tables import shapes
from tests.parity.hf_models import redraw, relative_error

TINY = DarkNetConfig(width=4, depths=(1, 2, 1))


def _conv(inside: int, outside: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outside),
        nn.LeakyReLU(0.1),
    )


class _Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class _Reference(nn.Module):
    """Redmon and Farhadi's table 1, row by row."""

    def __init__(self, width, repeats):
        super().__init__()
        self.first = _conv(3, width, 3)
        self.groups = nn.ModuleList()
        for repeat in repeats:
            residuals = [
                _Residual(_conv(2 * width, width, 1), _conv(width, 2 * width, 3))
                for _ in range(repeat)
            ]
            self.groups.append(nn.Sequential(_conv(width, 2 * width, 3, 2), *residuals))
            width *= 2

    def forward(self, image):
        x = self.first(torch.from_numpy(image).permute(0, 3, 1, 2))
        features = []
        for group in self.groups:
            x = group(x)
            features.append(x.permute(0, 2, 3, 1))
        return features[1:]  # Strides 4 and up.


def _write(model: nn.Module, path, header: bytes) -> None:
    """The authors' format: per convolution bias, scale, mean and variance of its norm, weights."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with open(path, "wb") as file:
        file.write(header)
        for conv, norm in zip(convolutions, norms, strict=True):
            parts = (norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight)
            for part in parts:
                file.write(part.detach().numpy().astype("<f4").tobytes())


NEW = np.array([0, 2, 0, 32013312, 0], "<i4").tobytes()
OLD = np.array([0, 1, 0, 32013312], "<i4").tobytes()


@pytest.fixture(scope="module")
def reference():
    return redraw(_Reference(TINY.width, (1, *TINY.depths)))


@pytest.fixture(scope="module")
def variables(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("darknet") / "tiny.weights"
    _write(reference, path, NEW)
    return darknet_from_file(path, TINY)


def _image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


def _by_stages(darknet: DarkNet, image: np.ndarray, train: bool = False) -> list[jax.Array]:
    """What a model that works between the stages does."""
    x = darknet.embed(image, train)
    features = []
    for i in range(len(darknet.config.depths)):
        x = darknet.stage(i, darknet.merge(i - 1, x, train) if i else x, train)
        features.append(x)
    return features


def test_features_of_every_stage(reference, variables):
    image = _image(54, 75)  # Even and odd before a stride.
    ours = jax.jit(DarkNet(TINY).apply)(variables, image)
    with torch.no_grad():
        theirs = reference(image)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors
    assert tuple(x.shape[-1] for x in ours) == TINY.widths
    assert ours[0].shape[1] == -(-54 // TINY.patch_size)


def test_training(variables, tmp_path):
    """Stage by stage; by the batch's statistics, which are recorded; blocks recomputed."""
    image = _image(30, 45)
    config = dataclasses.replace(TINY, remat=True)
    apply = functools.partial(
        DarkNet(config).apply, train=True, method=_by_stages, mutable="batch_stats"
    )
    equations = jax.make_jaxpr(apply)(variables, image).eqns
    names = [e.primitive.name for e in equations]
    assert sum("checkpoint" in n or "remat" in n for n in names) == 1 + sum(config.depths)
    ours, updated = jax.jit(apply)(variables, image)
    model = redraw(_Reference(TINY.width, (1, *TINY.depths))).train()
    with torch.no_grad():
        theirs = model(image)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors
    _write(model, tmp_path / "after.weights", NEW)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        updated["batch_stats"],
        darknet_from_file(tmp_path / "after.weights", TINY)["batch_stats"],
    )


def test_frozen_statistics(variables):
    """Training is then the program of evaluation."""
    darknet = DarkNet(dataclasses.replace(TINY, frozen_stats=True))
    programs = {
        str(
            jax.make_jaxpr(functools.partial(darknet.apply, train=train, mutable="batch_stats"))(
                variables, _image(32, 32)
            )
        )
        for train in (False, True)
    }
    assert len(programs) == 1


def test_bfloat16_compute(variables):
    half = jax.eval_shape(DarkNet(TINY, dtype=jnp.bfloat16).apply, variables, _image(32, 32))
    assert {x.dtype for x in half} == {jnp.dtype("bfloat16")}


def test_files(reference, variables, tmp_path):
    """The older header, a head behind the encoder, and what is refused."""
    path = tmp_path / "old.weights"
    _write(reference, path, OLD)
    content = path.read_bytes()
    path.write_bytes(content + b"head" * 5)
    jax.tree.map(np.testing.assert_array_equal, darknet_from_file(path, TINY), variables)
    path.write_bytes(content[:-4])
    with pytest.raises(UserError, match="old.weights ends after"):
        darknet_from_file(path, TINY)
    path.write_bytes(content)
    with pytest.raises(UserError, match="no variance where blocks_0_1/conv1 needs one"):
        darknet_from_file(path, dataclasses.replace(TINY, depths=(2, 1, 1)))
    with pytest.raises(UserError, match="no checkpoint at"):
        darknet_from_file(tmp_path / "nothing.weights", TINY)


def test_size_of_the_published_file():
    """darknet53.conv.74 has 162482580 bytes, 20 of them the header."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    leaves = jax.tree.leaves(shapes(DarkNet(DarkNetConfig()), image))
    assert 20 + 4 * sum(leaf.size for leaf in leaves) == 162482580
