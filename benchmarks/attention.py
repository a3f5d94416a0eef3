"""Where does cuDNN's fused attention win on this GPU? The models' attentions at paper size.

python -m benchmarks.attention [--model cris lavt] [--batch 8] [--repeats 50]

A JSON line per model and different attention, in bfloat16: what it is ("attention" for
`jax.nn.dot_product_attention`, "windows" for Swin's, "cells" for CLIP's pool and words), queries
[B,T,heads,width], how many keys S, whether there are a mask and a bias, how often the model calls
it, and of forward and backward pass

- ours_ms: in the operations that the model uses;
- cudnn_ms: in cuDNN's kernels, of Swin as with `swin.cudnn`; or "error", what cuDNN or JAX say
  where they do not take it;
- ours/cudnn: the ratio of the two.

Not among them are attentions whose weights are dropped in training, which JAX does not hand to
cuDNN (BERT's, and those of CRIS's decoder), and those of pixels and words, whose queries, keys or
values the models never make.
"""

import argparse
import functools
import json
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper import CONFIGS, batch_shapes, paper_config, paper_state, positive
from benchmarks.timing import seconds_of
from refseg_jax.models.encoders import clip, swin
from refseg_jax.models.layers.attention_kernel import self_attention
from refseg_jax.models.layers.window_attention import attend, attend_in_cudnn
from refseg_jax.predict import make_predict_step
from refseg_jax.sharding import jit_on_mesh, make_mesh


class Attention(NamedTuple):
    """One that a model calls; windows have `regions` [windows of a sample, n], or None."""

    kind: str
    queries: tuple[int, int, int, int]  # [B,T,heads,width]
    S: int
    masked: bool = False
    causal: bool = False
    regions: tuple[tuple[int, ...], ...] | None = None

    def describe(self) -> dict[str, Any]:
        windows = self.kind == "windows"
        about = {"attention": self.kind, "queries": self.queries, "S": self.S}
        return about | {"mask": self.masked or self.causal, "bias": windows}

    def arguments(self) -> tuple[jax.Array, ...]:
        """q, k, v and, of windows, their bias: noise."""
        B, T, heads, width = self.queries
        rng = np.random.default_rng(0)
        shapes = [(B, T, heads, width), *[(B, self.S, heads, width)] * 2]
        arrays = [jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes]
        if self.kind == "windows":
            arrays.append(jnp.asarray(rng.normal(size=(heads, T, T)), jnp.float32))
        return tuple(arrays)

    def ours(self, q, k, v, *bias):
        if self.kind == "windows":
            return self._in_windows(attend, q, k, v, *bias)
        if self.kind == "cells":
            flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
            return self_attention(*flat, q.shape[2], causal=self.causal).reshape(q.shape)
        return self._dot_product(q, k, v, None)

    def cudnn(self, q, k, v, *bias):
        if self.kind == "windows":
            return self._in_windows(attend_in_cudnn, q, k, v, *bias)
        return self._dot_product(q, k, v, "cudnn")

    def _in_windows(self, attend, q, k, v, bias):
        flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        regions = None if self.regions is None else np.array(self.regions)
        return attend(*flat, bias, regions).reshape(q.shape)

    def _dot_product(self, q, k, v, implementation):
        mask = jnp.ones((len(q), 1, 1, self.S), bool) if self.masked else None
        scale = None if self.kind == "attention" else 1.0  # The others' queries come scaled.
        how = dict(scale=scale, is_causal=self.causal, implementation=implementation)
        return jax.nn.dot_product_attention(q, k, v, None, mask, **how)


def attentions_of(name: str, batch: int) -> Counter[Attention]:
    """Those of a config's forward pass at paper size, and how often each is called."""
    config = paper_config(name, "bfloat16")
    model, _, state = paper_state(config)
    found: Counter[Attention] = Counter()

    def dot_product(q, k, v, bias=None, mask=None, *, is_causal=False, **_):
        assert bias is None and q.ndim == 4
        found[Attention("attention", q.shape, k.shape[1], mask is not None, is_causal)] += 1
        return q

    def windows(q, k, v, padding, bias, windows, cudnn):
        heads, n, _ = bias.shape
        queries = len(q) * windows.rows * windows.columns, n, heads, q.shape[2] // heads
        regions = windows.regions()
        each = None if regions is None else tuple(map(tuple, regions.tolist()))
        found[Attention("windows", queries, n, regions=each)] += 1
        return q

    def cells(q, k, v, heads, causal=False):
        B, N, C = q.shape
        found[Attention("cells", (B, N, heads, C // heads), N, causal=causal)] += 1
        return q

    with (
        mock.patch.object(jax.nn, "dot_product_attention", dot_product),
        mock.patch.object(clip, "self_attention", cells),
        mock.patch.object(swin, "window_attention", windows),
    ):
        shapes = state.variables(), batch_shapes(config, batch)
        jax.eval_shape(make_predict_step(model), *shapes)
    return found


def milliseconds(function: Callable, arguments: tuple[jax.Array, ...], repeats: int) -> float:
    """Of the forward and the backward pass."""

    def both(*arguments):
        y, pull_back = jax.vjp(function, *arguments)
        return pull_back(y)

    both = jit_on_mesh(make_mesh(1, 1), both)
    return round(1e3 * statistics.median(seconds_of(both, arguments, repeats)), 4)


def measure(attention: Attention, repeats: int) -> dict[str, Any]:
    """ours_ms, and cudnn_ms and the ratio or "error"."""
    time_of = functools.partial(milliseconds, arguments=attention.arguments(), repeats=repeats)
    result: dict[str, Any] = {"ours_ms": time_of(attention.ours)}
    try:
        result["cudnn_ms"] = time_of(attention.cudnn)
    except Exception as e:  # JAX and cuDNN have many for what they do not take.
        return result | {"error": " ".join(f"{type(e).__name__}: {e}".split())[:200]}
    return result | {"ours/cudnn": round(result["ours_ms"] / result["cudnn_ms"], 3)}


def main() -> None:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--repeats", type=positive, default=50)
    flags = parser.parse_args()
    device = jax.devices()[0].device_kind
    for name in flags.model:
        for attention, calls in attentions_of(name, flags.batch).items():
            line = {"model": name, **attention.describe(), "calls": calls, "device": device}
            print(json.dumps(line | measure(attention, flags.repeats)), flush=True)


if __name__ == "__main__":
    main()
