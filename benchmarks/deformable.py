"""How long does multi-scale deformable attention take, forward and with its gradients?

    python -m benchmarks.deformable

Times all forms of the sampling core and the six-layer encoder at the sizes of the small and of
the full AlignFormer. One JSON line per measurement: the best of `--repeats` runs.
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.paper import positive
from benchmarks.timing import seconds_of
from refseg_jax.models.layers.deformable import (
    DeformableEncoder,
    ms_deform_attn,
    pixel_centres,
)
from refseg_jax.sharding import jit_on_mesh, make_mesh

POINTS = 4
SIZES = {
    "small": {"batch": 8, "shapes": ((16, 16), (8, 8), (4, 4)), "dim": 96, "heads": 4},
    "full": {"batch": 1, "shapes": ((60, 60), (30, 30), (15, 15)), "dim": 256, "heads": 8},
}


def core_arguments(batch: int, shapes: tuple, dim: int, heads: int) -> tuple[jax.Array, ...]:
    """Values, locations a few pixels around each query's own, and weights."""
    value_key, offset_key, weight_key = jax.random.split(jax.random.key(0), 3)
    centres = jnp.asarray(pixel_centres(shapes))
    grid = (batch, len(centres), heads, len(shapes), POINTS)
    size = jnp.asarray(shapes, jnp.float32)[:, None, ::-1]
    offsets = 2 * jax.random.normal(offset_key, (*grid, 2)) / size
    weights = jax.random.uniform(weight_key, grid) / (len(shapes) * POINTS)
    value = jax.random.normal(value_key, (batch, len(centres), heads, dim // heads))
    return value, centres[:, None, None, None] + offsets, weights


def best_ms(function: Callable, arguments: tuple, repeats: int) -> float:
    """Milliseconds of the fastest of `repeats` calls, compilation excluded."""
    function = jit_on_mesh(make_mesh(1, 1), function)
    return round(1e3 * min(seconds_of(function, arguments, repeats)), 2)


def measure(name: str, function: Callable, arguments: tuple, repeats: int, **facts) -> None:
    """Prints the times of `function` and of its value with all gradients."""

    def with_gradients(*arguments):
        def scalar(*arguments):
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(function(*arguments)))

        return jax.value_and_grad(scalar, argnums=tuple(range(len(arguments))))(*arguments)

    line = {
        "benchmark": name,
        "device": jax.devices()[0].device_kind,
        **facts,
        "forward_ms": best_ms(function, arguments, repeats),
        "forward_backward_ms": best_ms(with_gradients, arguments, repeats),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=positive, default=10)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    options = parser.parse_args()

    for size in options.size or SIZES:
        facts = SIZES[size]
        shapes = facts["shapes"]
        arguments = core_arguments(**facts)
        for form in "gather", "matrix", "separable":

            def core(value, locations, weights, shapes=shapes, form=form):
                return ms_deform_attn(value, shapes, locations, weights, form)

            measure("core", core, arguments, options.repeats, size=size, form=form, **facts)

        dim = facts["dim"]
        encoder = DeformableEncoder(6, dim, facts["heads"], POINTS, ffn_dim=4 * dim)
        features = [jnp.ones((facts["batch"], *shape, dim)) for shape in shapes]
        variables = encoder.init(jax.random.key(0), features)
        measure(
            "encoder", encoder.apply, (variables, features), options.repeats, size=size, **facts
        )


if __name__ == "__main__":
    main()
