"""What a compiler made of a step, for benchmarks that have no device to run it on."""

import argparse
import collections
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.paper import batch_shapes, paper_state
from refseg_jax.predict import INPUTS, make_predict_step
from refseg_jax.sharding import batch_sharding, replicated, state_sharding
from refseg_jax.train import make_train_step

STEPS = ("train", "eval")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = re.compile(r"\b(pred|bf16|[a-z]+(\d+))\[([\d,]*)\]")


def step_and_shapes(config: Any, step: str, mesh: Mesh, rows: int) -> tuple[Any, tuple[Any, Any]]:
    """(the jitted step for the devices of `mesh`, the shapes and shardings that it takes)."""
    model, tx, state = paper_state(config)
    batch = batch_shapes(config, rows)
    if step == "train":
        rules = (config.mesh.rules, config.mesh.min_fsdp_size)
        function = make_train_step(config, model, tx, mesh, state_sharding(state, mesh, *rules))
        argument = state
    else:
        batch = {name: batch[name] for name in INPUTS}
        function = make_predict_step(model, batch_sharding(mesh))
        argument = with_sharding(state.variables(), replicated(mesh))
    return function, (argument, with_sharding(batch, batch_sharding(mesh)))


def trace_step(config: Any, step: str, mesh: Mesh, rows: int) -> Any:
    """The step for the devices of `mesh`, traced."""
    function, shapes = step_and_shapes(config, step, mesh, rows)
    return function.trace(*shapes)


def with_sharding(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def place(op_name: str) -> str:
    """`jit(f)/jvp(LAVT)/blocks_2_7/dot_general` -> `jvp(LAVT)/blocks_*/dot_general`."""
    name = re.sub(r"^jit\(\w*\)/", "", op_name)
    return re.sub(r"(_?\d+)+(?=/|$|\))", "*", name) or "(no name)"


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(the lines of each computation of a program, the name of the one that begins)."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*-> .*\{$", line)
        if header:
            name = header.group(2)
            lines[name] = []
            entry = name if header.group(1) else entry
        elif line.startswith("  "):
            lines[name].append(line)
    return lines, entry


class Program:
    """The text of a compiled program, summed up.

    Attributes:
      cycles: estimated cycles by operation.
      collectives: kind -> [number, bytes of results].
      loops_on_data: how many loops end where data says, or at what is not found; they count as if
        they ran once.
    """

    def __init__(self, text: str):
        self.cycles: collections.Counter[str] = collections.Counter()
        self.collectives: dict[str, list[int]] = {}
        self.loops_on_data = 0
        self._lines, entry = computations(text)
        self._add(entry, 1)

    def _trips(self, condition: str) -> int:
        """How often a loop runs, from the constant that its counter is compared with."""
        text = "\n".join(self._lines[condition])
        bounds = re.findall(r" = s32\[\]\S* constant\((\d+)\)", text)
        if len(bounds) == 1 and "direction=LT" in text:
            return int(bounds[0])
        self.loops_on_data += 1
        return 1

    def _add(self, computation: str, times: int) -> None:
        """Adds what `computation` takes when it runs so many times."""
        channels: set[str] = set()  # Of collectives that were counted.
        for line in self._lines[computation]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                self._add(loop.group(2), times * self._trips(loop.group(1)))
            branches = re.search(r" conditional\(.*branch_computations=\{([^}]*)\}", line)
            for branch in branches.group(1).split(", ") if branches else ():
                self._add(branch.lstrip("%"), times)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            if cycles:
                name = re.search(r'op_name="([^"]*)"', line)
                key = place(name.group(1) if name else "")
                self.cycles[key] += int(cycles.group(1)) * times
            # What is scattered is a fusion, of this name, of an all-reduce and what picks a part.
            scattered = re.search(r" = (.*?) fusion\(.* calls=%?all-(reduce-scatter)", line)
            if scattered:
                self._moved(*scattered.groups(), times)
                continue
            # Others may be spread over the fusions beside which they run.
            fused = re.search(r" fusion\(.* calls=%?([\w.\-]+)", line)
            for op in (line, *self._lines.get(fused.group(1), ())) if fused else (line,):
                kind = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", op)
                channel = kind and re.search(r"channel_id=(\d+)", op)
                if channel and channel.group(1) in channels:
                    continue
                if channel:
                    channels.add(channel.group(1))
                if kind:
                    self._moved(*kind.groups(), times)

    def _moved(self, types: str, kind: str, times: int) -> None:
        results = re.match(r"\(\(.*?\), (.*)\)$", types)  # Of a GPU, behind the operands.
        types = results.group(1) if results else types
        row = self.collectives.setdefault(kind, [0, 0])
        row[0] += times
        row[1] += times * result_bytes(types)


def result_bytes(types: str) -> int:
    """Bytes of the arrays in the type of an HLO result, `f32[8,128]{1,0}` or a tuple of such."""
    total = 0
    for match in BITS.finditer(re.sub(r"\{[^}]*\}", "", types)):
        bits = {"pred": 8, "bf16": 16}.get(match.group(1)) or int(match.group(2))
        total += bits * math.prod(int(n) for n in match.group(3).split(",") if n) // 8
    return total


def names_among(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """For argparse: names among those that are `known`, with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse
