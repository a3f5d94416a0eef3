"""Attention inside windows of a map as a kernel of our own for TPUs: what it does with a strip."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.windows import Windows
from refseg_jax.registers import LANES, product

# What is added to the logits of cells that are no neighbours on the map.
APART = -100.0

# Logits have a row for each key and a lane for each query of each head: a sum over keys adds up
# registers, where a sum over lanes would move them, and the queries of all heads fill the lanes
# better than the keys of a window. Each head's queries begin at a register; what remains of them
# beyond full registers comes after those of all heads.
MOST_LOGITS = 1 << 19  # At a time.
TOGETHER = 5  # Windows: while one waits for its products, another computes.


def _in_full_registers(n: int) -> int:
    return n // LANES * LANES


def lanes_of(n: int, heads: int) -> list[tuple[int, slice, slice]]:
    """(a head, some of its queries, the lanes where they lie), in the order of the lanes."""
    full = _in_full_registers(n)
    places, start = [], 0
    for queries in slice(0, full), slice(full, n):
        count = queries.stop - queries.start
        for head in range(heads if count else 0):
            places.append((head, queries, slice(start, start + count)))
            start += count
    return places


@dataclasses.dataclass(frozen=True)
class Strip:
    """What the kernel does with a strip of the map, `at`, and one of windows, `number`.

    `refs` has the blocks of arrays by their names, and as scratch NAME_cells, in which there are
    cells in windows [columns, rows of registers, 128]: those that were read, and then the results
    in the place of those that they belong to. NAME_kept is the like of results for later, and
    NAME_lanes biases and their gradients as logits lie.
    """

    windows: Windows
    dtype: jnp.dtype
    refs: SimpleNamespace
    at: jax.Array
    number: jax.Array

    @property
    def backward(self) -> bool:
        return hasattr(self.refs, "of_bias")

    @property
    def results(self) -> dict[str, str]:
        """Whose place they take."""
        return {"of_q": "q", "of_k": "k", "of_v": "v"} if self.backward else {"y": "q"}

    @property
    def sources(self) -> tuple[str, ...]:
        return ("q", "k", "v", "of_y") if self.backward else ("q", "k", "v")

    def ref(self, name: str) -> Any:
        return getattr(self.refs, name)

    def rows(self, start: int, count: int) -> slice:
        """Of registers, in which so many cells lie: two of bfloat16 share one."""
        packed = 4 // self.dtype.itemsize
        return slice(start // packed, (start + count) // packed)

    def around(self, name: str, rows: slice) -> jax.Array:
        """What lies around the map, in as many rows."""
        count = rows.stop - rows.start
        if name in ("k", "v"):
            return _as_rows(self.refs.padding)[("k", "v").index(name), :count]
        return jnp.zeros((count, LANES), self.refs.q_cells.dtype)

    def begin_group(self) -> None:
        """Of heads."""
        self.pad(self.sources)
        for head, queries, lanes in lanes_of(*self.refs.bias.shape[1::-1]):
            self.refs.bias_lanes[:, lanes] = self.refs.bias[head, :, queries]
        for name in ("of_bias_lanes", "of_padding"):
            if hasattr(self.refs, name):
                self.ref(name)[...] = jnp.zeros_like(self.ref(name))

    def end_group(self) -> None:
        if self.backward:
            for head, queries, lanes in lanes_of(*self.refs.bias.shape[1::-1]):
                self.refs.of_bias[head, :, queries] = self.refs.of_bias_lanes[:, lanes]

    def pad(self, names: Iterable[str]) -> None:
        """Fills the places beyond the end of the map's rows."""
        side = self.windows.side
        for name, row, run in itertools.product(names, range(side), _runs(self.windows)):
            if run.source is None:
                rows = self.rows(row * side + run.place, run.count)
                self.ref(f"{name}_cells")[run.column, rows] = self.around(name, rows)

    def _moves(self, first: int, last: int, to: int) -> Iterator[tuple[int, slice, slice]]:
        """(column of windows, rows of the windows there, rows of the strip) that are the same.

        From rows `first` to `last` of the map's strip, and row `to` of the windows on.
        """
        (_, w), side = self.windows.size, self.windows.side
        for row, run in itertools.product(range(first, last), _runs(self.windows)):
            if run.source is not None:
                place = (row - first + to) * side + run.place
                places = self.rows(place, run.count), self.rows(row * w + run.source, run.count)
                yield run.column, *places

    def read(self, first: int, last: int, to: int) -> None:
        """Moves rows of the map's strip into windows."""
        for name in self.sources:
            strip, cells = _as_rows(self.ref(name)), self.ref(f"{name}_cells")
            for column, place, source in self._moves(first, last, to):
                cells[column, place] = strip[0, source]
        side, last_strip = self.windows.side, self.windows.rows - 1
        below = self.windows.size[0] - last_strip * side
        if below < last:

            @pl.when(self.at == last_strip)
            def _():
                for name, row in itertools.product(self.sources, range(max(first, below), last)):
                    rows = self.rows((row - first + to) * side, side)
                    for column in range(self.windows.columns):
                        self.ref(f"{name}_cells")[column, rows] = self.around(name, rows)

    def write(self, first: int, last: int, to: int, kept: bool = False) -> None:
        """The reverse of `read` with the results."""
        for result, name in self.results.items():
            strip = _as_rows(self.ref(result))
            cells = self.ref(f"{result}_kept" if kept else f"{name}_cells")
            for column, place, target in self._moves(first, last, to):
                strip[0, target] = cells[column, place]

    def keep(self) -> None:
        """Puts the upper part of the results aside."""
        for result, name in self.results.items():
            kept = self.ref(f"{result}_kept")
            kept[...] = self.ref(f"{name}_cells")[:, : kept.shape[1]]

    def compute(self) -> None:
        columns, most = self.windows.columns, MOST_LOGITS // self.refs.bias.size
        divisors = [n for n in range(1, TOGETHER + 1) if columns % n == 0]
        together = max(n for n in divisors if n <= max(most, 1))

        def some(i, _):
            group = [i * together + j for j in range(together)]
            if self.backward:
                self._backward(group)
            else:
                self._forward(group)

        if self.backward:
            self.pad(("k", "v"))  # There are gradients now.
        if together == columns:
            some(0, None)
        else:
            jax.lax.fori_loop(0, columns // together, some, None)

    def _forward(self, columns: list) -> None:
        heads, results = len(self.refs.bias), []
        for column in columns:
            q, k, v = (self.cells(name, column) for name in self.sources)
            weights = _weights(_one_by_one(q, heads), k, self.bias(column)).astype(self.dtype)
            results.append([_sum_over_keys(weights, v, heads)])
        self.put(columns, results)

    def _backward(self, columns: list) -> None:
        heads, results = len(self.refs.bias), []
        of_bias = of_padding = 0
        for column in columns:
            q, k, v, of_y = (self.cells(name, column) for name in self.sources)
            queries, of_y = _one_by_one(q, heads), _one_by_one(of_y, heads)
            weights = _weights(queries, k, self.bias(column))
            of_weights = product(v, of_y, 1, 1)
            of_logits = weights * (of_weights - (weights * of_weights).sum(0, keepdims=True))
            of_bias += of_logits
            of_logits = of_logits.astype(self.dtype)
            of_q = _sum_over_keys(of_logits, k, heads)
            of_k = product(of_logits, queries, 1, 0)
            of_v = product(weights.astype(self.dtype), of_y, 1, 0)
            if self.windows.padded:
                outside = self.refs.outside[0, column]
                both = (x.astype(self.dtype) for x in (of_k, of_v))
                of_padding += jnp.stack([product(outside, x, 1, 0) for x in both])
            results.append([of_q, of_k, of_v])
        self.refs.of_bias_lanes[...] += of_bias
        if self.windows.padded:
            self.refs.of_padding[...] += of_padding
        self.put(columns, results)

    def cells(self, name: str, column: int) -> jax.Array:
        """Of a window, [n, 128]."""
        return pltpu.bitcast(self.ref(f"{name}_cells")[column], self.dtype)

    def put(self, columns: list, results: list[list[jax.Array]]) -> None:
        """The `results` of each window, after all of them were computed: else one would wait."""
        for column, of_window in zip(columns, results, strict=True):
            for name, x in zip(self.results.values(), of_window, strict=True):
                cells = self.ref(f"{name}_cells")
                cells[column] = pltpu.bitcast(x.astype(self.dtype), cells.dtype)

    def bias(self, column: int) -> jax.Array:
        """What is added to the logits of a window, float32 [n, heads · n]."""
        bias = self.refs.bias_lanes[...]
        if self.windows.shift:
            down, across = self.number == self.windows.rows - 1, column == self.windows.columns - 1
            kind = 2 * jnp.int32(down) + jnp.int32(across)
            bias += jnp.where(self.refs.keys[kind] == self.refs.queries[kind], 0.0, APART)
        return bias


class _Run(NamedTuple):
    """Cells side by side in a row of the map, and in a row of a window."""

    column: int  # Of windows.
    place: int  # Of the first in the window's row,
    source: int | None  # and in the map's, or None beyond its end.
    count: int


def _runs(windows: Windows) -> list[_Run]:
    """Those of a row of windows."""
    side, w = windows.side, windows.size[1]
    runs = []
    for column in range(windows.columns):
        cells = (np.arange(side) + column * side + windows.shift) % (windows.columns * side)
        ends = [0, *(np.flatnonzero((np.diff(cells) != 1) | (cells[1:] == w)) + 1), side]
        for first, end in itertools.pairwise(map(int, ends)):
            source = int(cells[first])
            runs.append(_Run(column, first, source if source < w else None, end - first))
    return runs


def _as_rows(ref: Any) -> Any:
    """`ref` as rows of registers: vector units of before v6e know no bfloat16, two of which are one
    integer."""
    return ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.int32)


def _weights(queries: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax over the keys, float32 [n, heads · n], of `_one_by_one` queries and k [n, 128]."""
    logits = product(k, queries, 1, 1) + bias
    weights = jnp.exp(logits - logits.max(0, keepdims=True))
    return weights * (1 / weights.sum(0, keepdims=True))


def _one_by_one(x: jax.Array, heads: int) -> jax.Array:
    """[n, 128] -> [heads · n, 128]: a copy for each head in which all others' lanes are 0.

    A product with them is one of full registers, and reads the other matrix once for all heads.
    Rows are in the order of `lanes_of`.
    """
    # Two rows of bfloat16 as one of integers: vector units of before v6e know no bfloat16.
    bits = pltpu.bitcast(x, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    head = jax.lax.div(lane, LANES // heads)
    full = _in_full_registers(len(x)) * len(bits) // len(x)
    copies = [jnp.where(head == i, bits, 0) for i in range(heads)]
    parts = [c[:full] for c in copies if full] + [c[full:] for c in copies if full < len(bits)]
    return pltpu.bitcast(jnp.concatenate(parts), x.dtype)


def _sum_over_keys(weights: jax.Array, x: jax.Array, heads: int) -> jax.Array:
    """[n, heads · n] and x [n, 128] -> float32 [n, 128], the lanes of each head by its weights.

    It is computed with channels as rows, of which each head's are multiplied alone, so that
    nothing as large as the weights is transposed.
    """
    n, d = len(x), LANES // heads
    full, x = _in_full_registers(n), x.T
    parts = []
    if full:
        own = [
            product(x[h * d : (h + 1) * d], weights[:, h * full : (h + 1) * full], 1, 0)
            for h in range(heads)
        ]
        parts.append(jnp.concatenate(own).T)
    if rest := n - full:
        y = product(x, weights[:, heads * full :], 1, 0)
        own = [y[h * d : (h + 1) * d, h * rest : (h + 1) * rest] for h in range(heads)]
        parts.append(jnp.concatenate(own).T)
    return jnp.concatenate(parts)
