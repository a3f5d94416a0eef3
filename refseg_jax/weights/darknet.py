"""DarkNet-53 in the binary format of its authors (darknet53.conv.74, yolov3.weights)."""

import collections
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.darknet import DarkNet, DarkNetConfig
from refseg_jax.weights.files import place_of
from refseg_jax.weights.tables import Conversion, shapes


def darknet_from_file(path: str | pathlib.Path, config: DarkNetConfig) -> dict[str, Any]:
    """Variables of `DarkNet(config)` (params, batch_stats) from a .weights file.

    As `convert_darknet` fills them; raises UserError as it does.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return convert_darknet(path, shapes(DarkNet(config), image)).tree


def convert_darknet(path: str | pathlib.Path, variables: Mapping) -> Conversion:
    """Fill the variables of a `DarkNet` from a .weights file.

    The format names nothing: a header, then float32 numbers, convolution by convolution. What
    follows the last one of ours belongs to a classifier or a detector and is left.

    Raises:
        UserError: there is no such file, it is too short, or the numbers cannot be what they are
            read as: a file of another architecture.
    """
    path = place_of(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a darknet .weights file")
    content = path.read_bytes()
    version = np.frombuffer(content[:8].ljust(8, b"\0"), "<i4")
    # Three numbers of the version, then how many images were seen, int64 since version 0.2.
    header = 20 if version.tolist() >= [0, 2] else 16
    numbers = np.frombuffer(content[header : len(content) // 4 * 4], "<f4")

    flat = traverse_util.flatten_dict(variables)
    needed = sum(leaf.size for leaf in flat.values())
    if len(numbers) < needed:
        raise UserError(
            f"{path} ends after {len(numbers)} numbers, a DarkNet of the configured sizes has "
            f"{needed}: download it again or correct the config"
        )
    for module in _modules(variables["params"]):
        for collection, *leaf in (
            ("params", "norm", "bias"),
            ("params", "norm", "scale"),
            ("batch_stats", "norm", "mean"),
            ("batch_stats", "norm", "var"),
            ("params", "conv", "kernel"),
        ):
            place = (collection, *module, *leaf)
            shape = flat[place].shape
            array, numbers = np.split(numbers, [np.prod(shape)])
            if leaf[-1] == "kernel":  # Theirs is [out, in, h, w].
                array = array.reshape(*shape[:1:-1], *shape[:2]).transpose(2, 3, 1, 0)
            if not np.isfinite(array).all():
                raise UserError(
                    f"{path} has a number that is not finite in {'/'.join(module)}: download it "
                    "again"
                )
            if leaf[-1] == "var" and not (array >= 0).all():
                raise UserError(
                    f"{path} has no variance where {'/'.join(module)} needs one: it is not a "
                    "DarkNet-53 of the configured sizes, give another one or correct the config"
                )
            flat[place] = array.astype(np.float32)
    left = [f"{len(numbers)} further numbers left"] if len(numbers) else []
    return Conversion(traverse_util.unflatten_dict(flat), "DarkNet-53", left, [])


def _modules(params: Mapping) -> Iterator[tuple[str, ...]]:
    """Paths of the convolutions in the order of their use."""
    depths = collections.Counter(name.split("_")[1] for name in params if "blocks_" in name)

    def residual(name: str) -> Iterator[tuple[str, ...]]:
        yield from ((name, "conv1"), (name, "conv2"))

    yield from (("stem_0",), ("stem_1",), *residual("stem_2"), ("stem_3",))
    for i in range(len(depths)):
        if i:
            yield (f"merges_{i - 1}",)
        for j in range(depths[str(i)]):
            yield from residual(f"blocks_{i}_{j}")
