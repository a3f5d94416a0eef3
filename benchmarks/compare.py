"""What the benchmarks against PyTorch share: both sides take turns, one JSON line comes out."""

import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch


def compare(
    name: str, ours: Callable[[], jax.Array], theirs: Callable[[], torch.Tensor], repeats: int
) -> None:
    """Prints the median seconds of each, `speedup` = PyTorch's over ours, and how they differ.

    The two take turns, so a busy machine slows both.
    """
    # The first calls compile and warm up, and show that both compute the same thing.
    a, b = np.asarray(ours()), theirs().numpy()
    pairs = [
        (_seconds(lambda: ours().block_until_ready()), _seconds(theirs)) for _ in range(repeats)
    ]
    jax_s, torch_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        json.dumps(
            {
                "benchmark": name,
                "device": jax.devices()[0].device_kind,
                "torch_threads": torch.get_num_threads(),
                "jax_s": round(jax_s, 4),
                "torch_s": round(torch_s, 4),
                "speedup": round(torch_s / jax_s, 3),
                "relative_difference": float(np.abs(a - b).max() / np.abs(b).max()),
            }
        ),
        flush=True,
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
