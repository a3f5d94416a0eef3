"""Seconds that a computation takes on the device that is here."""

import time
from collections.abc import Callable

import jax


def seconds_of(function: Callable, arguments: tuple, repeats: int) -> list[float]:
    """Of each of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - begun)
    return times
