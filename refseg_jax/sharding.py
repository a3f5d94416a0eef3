"""Mesh, parameter sharding by ordered path rules, and host arrays to device batches."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refseg_jax.errors import UserError

# Batches are split over both axes; the train state over "fsdp" alone, or, where there is one of it,
# over "data", and then a step gathers the parameters.
AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of data x fsdp devices; one of the two may be -1 (as many as there are).

    In a single process it may leave devices unused.

    Raises:
      UserError: more devices than there are, or, with several processes, fewer.
    """
    devices = jax.devices()
    sizes = [data, fsdp]
    if -1 in sizes:
        i = sizes.index(-1)
        sizes[i] = len(devices) // max(sizes[1 - i], 1)
    count = sizes[0] * sizes[1]
    too_few = jax.process_count() > 1 and count < len(devices)
    if min(sizes) < 1 or count > len(devices) or too_few:
        raise UserError(
            f"config.mesh data={data} fsdp={fsdp} does not fit the {len(devices)} devices here"
        )
    return _mesh(sizes, devices[:count])


def mesh_of_one(device: jax.Device) -> Mesh:
    """A mesh of `device` alone."""
    return _mesh([1, 1], [device])


def _mesh(sizes: list[int], devices: list[jax.Device]) -> Mesh:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced so that its kernels find the mesh whose devices they are divided among."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler for the devices of `mesh` has to be told."""
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    # Else it brings the largest array it can into the vector memory before a step begins: the
    # table of words, in whose place no map can lie until a few of its rows have been picked.
    return {"xla_msa_max_cross_program_prefetches": "0"}


def jit_on_mesh(mesh: Mesh, function: Callable, **options: Any) -> Callable:
    """`jax.jit` of `on_mesh`, with `compiler_options`."""
    return jax.jit(on_mesh(mesh, function), compiler_options=compiler_options(mesh), **options)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def divides_samples(samples: int, by: int = 1) -> bool:
    """Whether every device of the mesh in use has as many of an array's samples, by the `by`.

    Without a mesh (`on_mesh`) nothing is known of the devices: False.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and samples % (mesh.size * by) == 0


def on_tpus() -> bool:
    """Whether the devices of the mesh in use are TPUs. Without a mesh nothing is known: False."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind.startswith("TPU")


def on_gpus() -> bool:
    """As `on_tpus`, of GPUs.

    For what `platform_dependent` could do as well in a forward pass: in a train step every platform
    gets what all branches keep for the backward pass.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "gpu"


def on_gpus_with_cudnn() -> bool:
    """Whether these GPUs are what cuDNN's fused attention is made for.

    That is NVIDIA's from compute capability 8 on (Ampere, 2020).
    """
    if not on_gpus():
        return False
    kind = jax.sharding.get_abstract_mesh().abstract_device.device_kind
    here = [d for d in jax.local_devices() if d.platform == "gpu"]
    return kind.startswith("NVIDIA") and all(float(d.compute_capability) >= 8 for d in here)


def kernel_places() -> tuple[PartitionSpec, PartitionSpec]:
    """(of samples, of what all have in common) on the mesh in use, for a kernel's `shard_map`.

    XLA cannot divide among devices what a kernel computes.
    """
    return PartitionSpec(jax.sharding.get_abstract_mesh().axis_names), PartitionSpec()


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as a "/"-joined name."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def largest_divisible(
    shape: tuple[int, ...], axis: str, parts: int, min_size: int
) -> PartitionSpec:
    """Splits the largest dimension that `parts` divides over `axis`, from `min_size` numbers on."""
    candidates = [i for i, n in enumerate(shape) if n % parts == 0]
    if parts == 1 or math.prod(shape) < min_size or not candidates:
        return PartitionSpec()
    largest = max(candidates, key=lambda i: shape[i])
    return PartitionSpec(*[None] * largest, axis)


def state_sharding(
    state: Any, mesh: Mesh, rules: Any = (), min_size: int = 2**14, stored: bool = True
) -> Any:
    """A sharding for every leaf of `state` (a tree of arrays or shapes).

    `rules` is an ordered sequence of (path regex, tuple with an axis name or None per dimension);
    the first regex found in the leaf's path wins. Optimiser moments carry their parameter's path,
    hence its rule. A leaf that matches none takes `largest_divisible` over "fsdp", or, where that
    axis has size 1 and it is `stored`, over "data": every device holds and updates but its share of
    parameters, averages (`ema`) and moments, and a step gathers the parameters, which it needs
    whole (`stored` False; arXiv:2004.13336, ZeRO's first stage).

    Raises:
      UserError: a rule is none, does not fit a leaf, or, if `stored`, is found in no path.
    """

    def spec(path, leaf):
        name = path_name(path)
        for rule in rules:
            try:
                pattern, axes = rule
                if re.search(pattern, name):
                    sharding = NamedSharding(mesh, PartitionSpec(*axes))
                    sharding.shard_shape(leaf.shape)  # Fails where it does not fit.
                    return sharding
            except (re.error, IndexError, TypeError, ValueError) as e:
                raise UserError(
                    f"config.mesh.rules: {rule} is not (path regex, an axis of {AXES} or None per "
                    f"dimension) that fits {name} {leaf.shape}: {e}"
                ) from e
        axis = "data" if stored and mesh.shape["fsdp"] == 1 else "fsdp"
        return NamedSharding(mesh, largest_divisible(leaf.shape, axis, mesh.shape[axis], min_size))

    shardings = jax.tree_util.tree_map_with_path(spec, state)
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(state)]
    for pattern, axes in rules if stored else ():
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"config.mesh.rules: ({pattern!r}, {axes}) places nothing: it is found in no path "
                f"of the state, such as {next((path for path in paths if '/' in path), '')}"
            )
    return shardings


def gatherer(mesh: Mesh, rules: Any, min_size: int) -> Callable[[Any], Any]:
    """A function for traced parameters: what devices hold shares of is whole on each.

    Not what is split over "fsdp", or by one of the `rules` (see `state_sharding`).
    """

    def gather(params: Any) -> Any:
        places = state_sharding({"params": params}, mesh, rules, min_size, stored=False)
        return jax.lax.with_sharding_constraint(params, places["params"])

    return gather


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over the mesh.

    Raises:
      UserError: the devices cannot share the rows evenly.
    """
    sharding = batch_sharding(mesh)
    rows = len(next(iter(batch.values()))) * jax.process_count()
    if rows % mesh.size:
        raise UserError(
            f"a batch of {rows} rows cannot be shared evenly by {mesh.size} devices: change "
            "config.eval.batch_size, config.train.batch_size or config.mesh"
        )
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
