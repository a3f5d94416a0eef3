"""Attention inside windows of a map as a kernel of our own for TPUs: what it does with a strip."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
TOGETHER_ON_WIDE_MAPS = 2

# Up to this side of windows, and so many in a row, there is memory for biases of fewer queries. And
# strips of wider maps leave it for fewer windows together.
MOST_SIDE, MOST_COLUMNS = 12, 10

ASKING = ("q", "of_y")  # What has a row for each query.


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
class Kind:
    """Windows that are computed alike: inside the map, or at one of its ends, or at two.

    Attributes:
        side: of the window.
        rows: those whose cells are queries. What pads the map is asked, but does not ask.
        columns: the same.
        down: how many rows, the window's last, are from the other end of the map.
        across: the same of columns.
    """

    side: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    down: int
    across: int

    @property
    def whole(self) -> bool:
        """Whether all cells are queries."""
        return len(self.rows) == len(self.columns) == self.side

    @property
    def cut(self) -> bool:
        """Whether there are cells from different ends of the map."""
        return bool(self.down or self.across)

    def queries(self) -> np.ndarray:
        """Those of the window's cells, in their order."""
        return (np.array(self.rows)[:, None] * self.side + np.array(self.columns)).ravel()

    def regions(self) -> np.ndarray:
        """From which ends of the map each cell is, as a number: int32 [side²]."""
        place = np.arange(self.side)
        down, across = (np.int32(place >= self.side - n) for n in (self.down, self.across))
        return (2 * down[:, None] + across).ravel()


@functools.cache
def rows_of_windows(windows: Windows) -> tuple[tuple[Kind, Kind], tuple[Kind, Kind]]:
    """(all windows but the last, the last) of all rows of windows but the last, and of the last.

    Where more than two thirds of its rows or columns are on the map, all of them ask: fewer would
    fill registers less well. And so it is beyond `MOST_SIDE` and `MOST_COLUMNS`.
    """
    side, shift = windows.side, windows.shift
    on_map = windows.cells().reshape(windows.rows, windows.columns, side, side) >= 0
    whole = tuple(range(side))

    def asking(on_map: np.ndarray) -> tuple[int, ...]:
        places = tuple(np.flatnonzero(on_map).tolist())
        few = 3 * len(places) <= 2 * side
        room = side <= MOST_SIDE and windows.columns <= MOST_COLUMNS
        return places if few and room else whole

    rows = (whole, 0), (asking(on_map[-1].any((0, 2))), shift)
    columns = (whole, 0), (asking(on_map[:, -1].any((0, 1))), shift)
    upper, lower = (
        tuple(Kind(side, of_rows, of_columns, down, across) for of_columns, across in columns)
        for of_rows, down in rows
    )
    return upper, lower


@functools.cache
def kinds_of(windows: Windows) -> tuple[Kind, ...]:
    """Those that differ; with one row or column of windows, also some that it has not.

    The first, inside the map, is whole.
    """
    return tuple(dict.fromkeys(itertools.chain(*rows_of_windows(windows))))


@dataclasses.dataclass(frozen=True)
class Strip:
    """What the kernel does with a strip of the map and a row of windows.

    `refs` has the blocks of arrays by their names, and as scratch NAME_cells [rows of windows,
    columns, rows of registers, 128], cells in windows, of which this row is number `row`: those
    that were read, and then the results in their place. Of what is `ASKING`, columns of a window
    that do not ask are left out. NAME_kept is the like of results for later. NAME_lanes with the
    number of a kind of windows are biases and their gradients as logits lie; where not all cells
    ask they are of NAME_few, which has one kind's queries after the other's.
    """

    windows: Windows
    dtype: jnp.dtype
    refs: SimpleNamespace
    row: int = 0

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

    @property
    def heads(self) -> int:
        return len(self.refs.bias)

    def ref(self, name: str) -> Any:
        return getattr(self.refs, name)

    def lanes(self, name: str, kind: Kind) -> str:
        """The name of biases or their gradients; kinds in which all cells ask share theirs."""
        return f"{name}_lanes{0 if kind.whole else kinds_of(self.windows).index(kind)}"

    def rows(self, start: int, count: int) -> slice:
        """Of registers, in which so many cells lie: two of bfloat16 share one."""
        packed = 4 // self.dtype.itemsize
        return slice(start // packed, (start + count) // packed)

    def place(self, name: str, row: int, run: "_Run") -> slice | None:
        """The rows of registers of a run in the window's row `row`; None if it is left out."""
        if name not in ASKING:
            return self.rows(row * self.windows.side + run.place, run.count)
        if run.asking is None:
            return None
        return self.rows(row * run.width + run.asking, run.count)

    def around(self, name: str, rows: slice) -> jax.Array:
        """What lies around the map, in as many rows."""
        shape = rows.stop - rows.start, LANES
        if name in ("k", "v"):
            row = _as_rows(self.refs.padding)[("k", "v").index(name), :1]
            return jnp.broadcast_to(row, shape)
        return jnp.zeros(shape, self.refs.q_cells.dtype)

    def _biases(self, name: str) -> Iterator[tuple[Any, slice, Any, tuple]]:
        """(NAME_lanes, some of its lanes, the group's NAME, where they are there)."""
        start = 0
        for number, kind in enumerate(kinds_of(self.windows)):
            if number and kind.whole:
                continue
            block, count = self.ref(f"{name}_few" if number else name), kind.queries().size
            for head, queries, lanes in lanes_of(count, self.heads):
                place = slice(start + queries.start, start + queries.stop)
                yield self.ref(self.lanes(name, kind)), lanes, block, (head, slice(None), place)
            start += count if number else 0

    def begin_group(self) -> None:
        """Of heads."""
        for row in range(len(self.refs.q_cells)):
            dataclasses.replace(self, row=row).pad(self.sources)
        for array, lanes, block, place in self._biases("bias"):
            array[:, lanes] = block[place]
        for kind in kinds_of(self.windows):
            if kind.cut and not kind.whole:
                self.ref(self.lanes("bias", kind))[...] += self.apart(kind)
        for name, ref in vars(self.refs).items():
            if name.startswith(("of_bias_lanes", "of_padding")):
                ref[...] = jnp.zeros_like(ref)

    def end_group(self) -> None:
        for array, lanes, block, place in self._biases("of_bias") if self.backward else ():
            block[place] = array[:, lanes]

    def pad(self, names: Iterable[str]) -> None:
        """Fills the places beyond the end of the map's rows."""
        runs = [run for run in _runs(self.windows) if run.source is None]
        for name, row, run in itertools.product(names, range(self.windows.side), runs):
            rows = self.place(name, row, run)
            if rows is not None:
                self.ref(f"{name}_cells")[self.row, run.column, rows] = self.around(name, rows)

    def _moves(
        self, name: str, first: int, last: int, to: int, at: int
    ) -> Iterator[tuple[int, slice, slice]]:
        """(column of windows, rows of the windows there, rows of the block) that are the same.

        From rows `first` to `last` of the block's strip `at`, and row `to` of the windows on.
        """
        (_, w), side = self.windows.size, self.windows.side
        runs = [run for run in _runs(self.windows) if run.source is not None]
        for row, run in itertools.product(range(first, last), runs):
            source = self.rows((at * side + row) * w + run.source, run.count)
            yield run.column, self.place(name, row - first + to, run), source

    def _on_map(self, last: int, end: bool) -> int:
        """Of rows up to `last` of a strip, which is the map's last or not, those on the map."""
        windows = self.windows
        return min(last, windows.size[0] - (windows.rows - 1) * windows.side) if end else last

    def read(self, first: int, last: int, to: int, end: bool, at: int = 0) -> None:
        """Moves rows of the map's strip into windows. At its `end` the rest is what pads it."""
        on_map = max(first, self._on_map(last, end))
        kinds = self.kinds(end)
        for name in self.sources:
            strip, cells = _as_rows(self.ref(name)), self.ref(f"{name}_cells")
            for column, place, source in self._moves(name, first, on_map, to, at):
                cells[self.row, column, place] = strip[0, source]
            if on_map == last or (name in ASKING and to == 0 and len(kinds[0].rows) < last):
                continue  # In the upper part of the last row of windows these do not ask.
            for column, kind in enumerate(kinds):
                width = len(kind.columns) if name in ASKING else kind.side
                rows = self.rows((on_map - first + to) * width, (last - on_map) * width)
                cells[self.row, column, rows] = self.around(name, rows)

    def write(
        self, first: int, last: int, to: int, end: bool, at: int = 0, kept: bool = False
    ) -> None:
        """The reverse of `read` with the results."""
        for result, name in self.results.items():
            strip = _as_rows(self.ref(result))
            cells = self.ref(f"{result}_kept" if kept else f"{name}_cells")
            for column, place, target in self._moves(name, first, self._on_map(last, end), to, at):
                strip[0, target] = cells[self.row, column, place]

    def kinds(self, end: bool) -> list[Kind]:
        """Of a row of windows, the last or not."""
        kind, last = rows_of_windows(self.windows)[end]
        return [*[kind] * (self.windows.columns - 1), last]

    def keep(self) -> None:
        """Puts the upper part of the results aside."""
        for result, name in self.results.items():
            kept = self.ref(f"{result}_kept")
            kept[...] = self.ref(f"{name}_cells")[:, :, : kept.shape[2]]

    def compute(self, end: bool) -> None:
        """A row of windows, the last or not."""
        if self.backward:
            self.pad(("k", "v"))  # There are gradients now.
        columns, most = self.windows.columns, MOST_LOGITS // self.refs.bias.size
        most = min(most, TOGETHER if columns <= MOST_COLUMNS else TOGETHER_ON_WIDE_MAPS)
        together = max(n for n in range(1, max(most, 1) + 1) if columns % n == 0)
        compute = self._backward if self.backward else self._forward
        kind, last = rows_of_windows(self.windows)[end]

        def some(i: int | jax.Array, ending: Kind) -> None:
            kinds = [kind] * (together - 1) + [ending]
            compute([(i * together + j, kind) for j, kind in enumerate(kinds)])

        alike = columns // together - (kind != last)
        if alike == 1:
            some(0, kind)
        elif alike:
            jax.lax.fori_loop(0, alike, lambda i, _: some(i, kind), None)
        if kind != last:
            some(alike, last)

    def _forward(self, these: list[tuple[Any, Kind]]) -> None:
        results = []
        for column, kind in these:
            q, k, v = (self.cells(name, column, kind) for name in self.sources)
            weights = _weights(_one_by_one(q, self.heads), k, self.bias(kind)).astype(self.dtype)
            results.append([_sum_over_keys(weights, v, self.heads)])
        self.put(these, results)

    def _backward(self, these: list[tuple[Any, Kind]]) -> None:
        results, of_bias, of_padding = [], {}, 0
        for column, kind in these:
            q, k, v, of_y = (self.cells(name, column, kind) for name in self.sources)
            queries, of_y = _one_by_one(q, self.heads), _one_by_one(of_y, self.heads)
            weights = _weights(queries, k, self.bias(kind))
            of_weights = product(v, of_y, 1, 1)
            of_logits = weights * (of_weights - (weights * of_weights).sum(0, keepdims=True))
            lanes = self.lanes("of_bias", kind)
            of_bias[lanes] = of_bias.get(lanes, 0) + of_logits
            of_logits = of_logits.astype(self.dtype)
            of_q = _sum_over_keys(of_logits, k, self.heads)
            of_k = product(of_logits, queries, 1, 0)
            of_v = product(weights.astype(self.dtype), of_y, 1, 0)
            if self.windows.padded:
                outside = self.refs.outside[self.row, column]
                both = (x.astype(self.dtype) for x in (of_k, of_v))
                of_padding += jnp.stack([product(outside, x, 1, 0) for x in both])
            results.append([of_q, of_k, of_v])
        for name, x in of_bias.items():
            self.ref(name)[...] += x
        if self.windows.padded:
            self.refs.of_padding[...] += of_padding
        self.put(these, results)

    def places(self, name: str, kind: Kind) -> list[slice]:
        """The rows of registers in which a window's queries, or keys, are."""
        if name not in ASKING:
            return [self.rows(0, kind.side**2)]
        rows, width = kind.rows, len(kind.columns)
        starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1] != row - 1]
        return [
            self.rows(rows[start] * width, (end - start) * width)
            for start, end in itertools.pairwise([*starts, len(rows)])
        ]

    def cells(self, name: str, column: Any, kind: Kind) -> jax.Array:
        """Of a window, [n, 128]."""
        ref = self.ref(f"{name}_cells")
        rows = [ref[self.row, column, place] for place in self.places(name, kind)]
        return pltpu.bitcast(jnp.concatenate(rows), self.dtype)

    def put(self, these: list[tuple[Any, Kind]], results: list[list[jax.Array]]) -> None:
        """The `results` of each window, after all of them were computed: else one would wait."""
        for (column, kind), of_window in zip(these, results, strict=True):
            for name, x in zip(self.results.values(), of_window, strict=True):
                cells = self.ref(f"{name}_cells")
                x, start = pltpu.bitcast(x.astype(self.dtype), cells.dtype), 0
                for place in self.places(name, kind):
                    end = start + place.stop - place.start
                    cells[self.row, column, place] = x[start:end]
                    start = end

    def bias(self, kind: Kind) -> jax.Array:
        """What is added to the logits of a window, float32 [n, heads · queries]."""
        bias = self.ref(self.lanes("bias", kind))[...]
        return bias + self.apart(kind) if kind.whole and kind.cut else bias

    def apart(self, kind: Kind) -> jax.Array:
        """The same for cells that are no neighbours."""
        number, lanes = kinds_of(self.windows).index(kind), self.heads * kind.queries().size
        keys, queries = self.refs.keys[:, number][:, None], self.refs.queries[number, :lanes][None]
        return jnp.where(keys == queries, 0.0, APART)


class _Run(NamedTuple):
    """Cells side by side in a row of the map, and in a row of a window."""

    column: int  # Of windows.
    place: int  # Of the first in the window's row,
    source: int | None  # and in the map's, or None beyond its end.
    count: int
    asking: int | None  # Its place among the columns that ask, if it does,
    width: int  # and how many there are.


def _runs(windows: Windows) -> list[_Run]:
    """Those of a row of windows."""
    side, w = windows.side, windows.size[1]
    kind, last = rows_of_windows(windows)[0]
    runs = []
    for column in range(windows.columns):
        asking = (last if column == windows.columns - 1 else kind).columns
        cells = (np.arange(side) + column * side + windows.shift) % (windows.columns * side)
        ends = [0, *(np.flatnonzero((np.diff(cells) != 1) | (cells[1:] == w)) + 1), side]
        for first, end in itertools.pairwise(map(int, ends)):
            source = int(cells[first])
            place = asking.index(first) if first in asking else None
            source = source if source < w else None
            runs.append(_Run(column, first, source, end - first, place, len(asking)))
    return runs


def _as_rows(ref: Any) -> Any:
    """`ref` as rows of registers: vector units of before v6e know no bfloat16, two of which are one
    integer."""
    return ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.int32)


def _weights(queries: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax over the keys, float32 [keys, heads · n], of `_one_by_one` queries, k [keys, 128]."""
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
    """[keys, heads · n] and x [keys, 128] -> float32 [n, 128], each head's lanes by its weights.

    It is computed with channels as rows, of which each head's are multiplied alone, so that
    nothing as large as the weights is transposed.
    """
    n, d = weights.shape[1] // heads, LANES // heads
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
