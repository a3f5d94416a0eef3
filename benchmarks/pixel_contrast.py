"""What does CoupAlign's auxiliary loss cost in blocks, against the matrix of all pairs?

python -m benchmarks.pixel_contrast [--sides 28,56,112] [--dim 512] [--foreground 0.2] [--batch 1]

Loss and gradient over maps of side x side pixels. One JSON line per form and size: seconds (the
best of `--repeats` runs) and the temporary memory that XLA plans for, in MiB. A form that would
take more than `--limit_gib` is planned but not run.
"""

import argparse
import json
import math

import jax
import jax.numpy as jnp

from benchmarks.paper import integers, positive
from benchmarks.timing import seconds_of
from refseg_jax.losses.contrastive import unit_length
from refseg_jax.losses.pixel_contrast import pixel_contrast_loss


def all_pairs_loss(pixels: jax.Array, labels: jax.Array, temperature: float = 0.1) -> jax.Array:
    """`pixel_contrast_loss` with the S x S products of every image in memory: [B]."""
    vectors = unit_length(pixels) / math.sqrt(temperature)
    products = jnp.einsum("bsc,btc->bst", vectors, vectors)
    other = labels[:, :, None] != labels[:, None]
    opposite = jax.nn.logsumexp(products, axis=2, where=other)
    loss = 0.0
    for member in (labels, ~labels):
        count = jnp.maximum(member.sum(1), 1)
        prototype = jnp.einsum("bs,bsc->bc", member, vectors) / count[:, None]
        own = jnp.einsum("bsc,bc->bs", vectors, prototype)
        terms = jnp.where(member, jax.nn.softplus(opposite - own), 0)
        loss += terms.sum(1) / count
    return jnp.where(labels.any(1) & ~labels.all(1), loss, 0)


def measure(form: str, function, arguments: tuple, options: argparse.Namespace, side: int) -> None:
    """Prints the line of one form at one size."""
    step = jax.jit(jax.value_and_grad(lambda *arguments: function(*arguments).sum()))
    compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    line = {
        "benchmark": "pixel_contrast",
        "form": form,
        "device": jax.devices()[0].device_kind,
        "side": side,
        "batch": options.batch,
        "dim": options.dim,
        "foreground": options.foreground,
        "temporary_mib": round(memory / 2**20, 1),
        "seconds": None,
    }
    if memory <= options.limit_gib * 2**30:
        times = seconds_of(compiled, arguments, options.repeats)
        loss, _ = compiled(*arguments)
        line |= {"seconds": round(min(times), 4), "loss": round(float(loss) / options.batch, 5)}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=integers, default=(28, 56, 112))
    parser.add_argument("--dim", type=positive, default=512)
    parser.add_argument("--foreground", type=float, default=0.2, help="share of the pixels")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--limit_gib", type=float, default=8.0)
    options = parser.parse_args()
    for side in options.sides:
        pixel_key, label_key = jax.random.split(jax.random.key(0))
        shape = (options.batch, side * side)
        pixels = jax.random.normal(pixel_key, (*shape, options.dim))
        labels = jax.random.uniform(label_key, shape) < options.foreground
        for form, function in (("blocks", pixel_contrast_loss), ("all pairs", all_pairs_loss)):
            measure(form, function, (pixels, labels), options, side)


if __name__ == "__main__":
    main()
