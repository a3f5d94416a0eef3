"""How long do a step's own kernels take on a TPU? By the instructions that they compile to.

XLA estimates cycles for its operations, but has none for a kernel that it is given. So
benchmarks/tpu_compile.py starts this as a process of its own, in which libtpu writes down the
instructions of each kernel, compiled by itself: one bundle of them per cycle, as often as the
kernel's grid has steps, which a chip's cores share if they can. What it does in some steps only
counts in those, what data may have it do always, and a loop as often as it runs, or, where its end
is data, as it may at most. And at least as many cycles as the chip's matrix units take, at their
peak, for the kernel's products, as their instructions may follow each other faster than that, and
as its memory takes, at its full speed, for what the kernel reads and writes.

It prints a JSON object of the cycles of one chip by kernel.
"""

import argparse
import collections
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import SingleDeviceSharding

from benchmarks.compiled import STEPS, trace_step
from benchmarks.paper import CONFIGS, jaxprs_in_params, paper_config, positive, product_flops
from benchmarks.tpu_compile import CHIPS, Chip, mesh_of


def kernel_cycles(config: str, step: str, topology: str, rows: int, dtype: str) -> dict[str, int]:
    """What the process prints."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.tpu_kernels",
        config,
        step,
        topology,
        str(rows),
        dtype,
    ]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def kernels_of(jaxpr: Jaxpr) -> list[tuple[JaxprEqn, int]]:
    """A TPU's different kernels of a traced function, each with how often it is called."""
    kernels: dict[str, JaxprEqn] = {}
    times = collections.Counter()

    def find(jaxpr: Jaxpr, many: int) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                shapes = [str(v.aval) for v in (*eqn.invars, *eqn.outvars)]
                key = f"{eqn.params['name']} {shapes} {eqn.params['jaxpr']}"
                kernels[key] = eqn
                times[key] += many
                continue
            inner = list(jaxprs_in_params(eqn.params))
            platforms = eqn.params.get("branches_platforms")
            if platforms:
                tpu = [x for x, p in zip(inner, platforms, strict=True) if p and "tpu" in p]
                inner = tpu or [inner[platforms.index(None)]]
            for x in inner:
                find(x, many * eqn.params.get("length", 1))

    find(jaxpr, 1)
    return [(kernels[key], times[key]) for key in kernels]


def write_down(directory: pathlib.Path) -> None:
    """Has libtpu write instructions to `directory`; it must not have started, as for a mesh."""
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )


class Straight(NamedTuple):
    """A kernel as one step of its grid runs it, without branches and but one loop, or none."""

    jaxpr: Jaxpr
    choices: tuple[int, ...]  # Of its branches, one after another.
    lengths: tuple[int, ...]  # Of its loops.


def straighten(jaxpr: Jaxpr, step: dict[int, int], loop: int | None = None) -> Straight:
    """What a kernel does where the axes of its grid that it asks for are at `step`.

    Loops are left out, but for that with number `loop`.
    """
    eqns, choices, lengths = [], [], []
    known: dict[Var, Any] = {}  # The numbers that follow from the step.
    most: dict[Var, int] = {}  # What others are at most.

    def run(jaxpr: Jaxpr, arguments: list) -> list:
        names = dict(zip(jaxpr.invars, arguments, strict=True))

        def atom(x):
            return x if isinstance(x, Literal) else names[x]

        def of_loop(eqn: JaxprEqn, inputs: list) -> tuple[int, int]:
            """How many of its inputs are constants, and how often it runs."""
            if eqn.primitive.name == "scan":
                return eqn.params["num_consts"], eqn.params["length"]
            # What jax.lax.fori_loop makes: from a number, at least 0, to another.
            constants = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
            end = inputs[constants + 1]
            if isinstance(end, Literal):
                return constants, int(end.val)
            if end not in most:
                raise ValueError(
                    "how often a kernel's loop runs at most is not known: it must end at a "
                    "number or at jnp.minimum(data, number)"
                )
            return constants, most[end]

        for eqn in jaxpr.eqns:
            inputs = [atom(x) for x in eqn.invars]
            values = [x.val if isinstance(x, Literal) else known.get(x) for x in inputs]
            if eqn.primitive.name == "cond":
                # A branch on data is taken: of two, the second does something.
                last = len(eqn.params["branches"]) - 1
                choices.append(last if values[0] is None else int(values[0]))
                outputs = run(eqn.params["branches"][choices[-1]].jaxpr, inputs[1:])
            elif eqn.primitive.name in ("scan", "while") and loop != len(lengths):
                constants, length = of_loop(eqn, inputs)
                lengths.append(length)
                outputs = inputs[constants:]
            else:
                if eqn.primitive.name in ("scan", "while"):
                    lengths.append(of_loop(eqn, inputs)[1])
                outputs = [Var(x.aval) for x in eqn.outvars]
                eqns.append(eqn.replace(invars=inputs, outvars=outputs))
                if eqn.primitive.name == "min" and isinstance(inputs[1], Literal):
                    most[outputs[0]] = int(inputs[1].val)
                if eqn.primitive.name == "program_id":
                    known[outputs[0]] = np.int32(step[eqn.params["axis"]])
                elif values and not any(x is None for x in values):
                    results = eqn.primitive.bind(*values, **eqn.params)
                    many = eqn.primitive.multiple_results
                    known.update(zip(outputs, results if many else [results], strict=True))
            names.update(zip(eqn.outvars, outputs, strict=True))
        return [atom(x) for x in jaxpr.outvars]

    outvars = run(jaxpr, jaxpr.invars)
    straight = jaxpr.replace(eqns=eqns, outvars=outvars)
    return Straight(straight, tuple(choices), tuple(lengths))


def _asked(jaxpr: Jaxpr) -> set[int]:
    """The axes of its grid that a kernel asks for."""
    axes = {e.params["axis"] for e in jaxpr.eqns if e.primitive.name == "program_id"}
    inner = [x for e in jaxpr.eqns for x in jaxprs_in_params(e.params)]
    return axes.union(*map(_asked, inner))


def cycles_of(
    eqn: JaxprEqn, device: jax.Device, dump: pathlib.Path, per_cycle: float = math.inf
) -> int:
    """Of all steps of a kernel's grid, by the instructions that libtpu writes down in `dump`.

    Or, of a step, by its products, if that is more: the matrix units of a core do `per_cycle`
    operations.
    """
    jaxpr, grid = eqn.params["jaxpr"], eqn.params["grid_mapping"].grid
    asked = sorted(_asked(jaxpr))
    steps = [
        dict(zip(asked, at, strict=True))
        for at in itertools.product(*(range(grid[i]) for i in asked))
    ]
    alike = collections.defaultdict(list)
    for step in steps:
        alike[straighten(jaxpr, step).choices].append(step)
    total = 0
    for first, *others in alike.values():
        straight = straighten(jaxpr, first)
        without, others_inside = bundles(eqn, straight.jaxpr, device, dump)
        count, once = without, product_flops(straight.jaxpr, unrolled=False)
        operations = once
        for loop, length in enumerate(straight.lengths):
            looping = straighten(jaxpr, first, loop).jaxpr
            with_it, inside = bundles(eqn, looping, device, dump)
            count += with_it - without + (length - 1) * (inside - others_inside)
            operations += length * (product_flops(looping, unrolled=False) - once)
        total += max(count, math.ceil(operations / per_cycle)) * (1 + len(others))
    return total * (math.prod(grid) // len(steps))


def bundles(eqn: JaxprEqn, jaxpr: Jaxpr, device: jax.Device, dump: pathlib.Path) -> tuple[int, int]:
    """Instructions of a kernel, with `jaxpr` for its own, and how many of them are inside of loops.

    The compiler has loops of its own, which move what is no whole number of tiles.
    """
    sharding = SingleDeviceSharding(device)
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding) for v in eqn.invars
    ]
    known = set(dump.iterdir())

    def alone(*arrays):
        return eqn.primitive.bind(*arrays, **eqn.params | {"jaxpr": jaxpr})

    jax.jit(alone).lower(*shapes).compile()
    # The kernel is named after the function; beside it are copies to the layouts that it wants.
    files = set(dump.glob("*-alone.*-final_bundles.txt")) - known
    (text,) = (f.read_text() for f in files if "schedule-analysis" not in f.name)
    # An address, and for each loop around it a ">", of which the first is the grid's.
    loops = re.findall(r"^ *0x[0-9a-f]+ *\w* *: (>*)", text, re.MULTILINE)
    return len(loops), sum(len(x) > 1 for x in loops)


def chip_cycles(eqn: JaxprEqn, device: jax.Device, kind: Chip, dump: pathlib.Path) -> int:
    """Of a chip, by a kernel's instructions, by its products, or by what it reads and writes."""
    arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    traffic = sum(x.size * x.dtype.itemsize for x in arrays)
    cores = cores_that_share(eqn, device.num_cores)
    per_cycle = 1e3 * kind.tflops / kind.ghz / device.num_cores
    cycles = cycles_of(eqn, device, dump, per_cycle) // cores
    return max(cycles, int(traffic * kind.ghz / kind.gbytes))


def cores_that_share(eqn: JaxprEqn, cores: int) -> int:
    """All of a chip's, if they divide an axis of the kernel's grid that may go in parallel."""
    semantics = getattr(eqn.params["compiler_params"], "dimension_semantics", None) or ()
    sizes = eqn.params["grid_mapping"].grid
    shared = (n for n, how in zip(sizes, semantics, strict=False) if how == "parallel")
    return cores if any(n % cores == 0 for n in shared) else 1


def main() -> None:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("topology", help="such as v5e:2x2")
    parser.add_argument("rows", type=positive, help="per chip")
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    kind = CHIPS[args.topology.partition(":")[0]]
    with tempfile.TemporaryDirectory() as dump:
        write_down(pathlib.Path(dump))
        mesh = mesh_of(args.topology)
        config = paper_config(args.config, args.dtype)
        traced = trace_step(config, args.step, mesh, args.rows * mesh.size)
        cycles = collections.Counter()
        chip = mesh.devices.flat[0]
        for eqn, times in kernels_of(traced.jaxpr.jaxpr):
            once = chip_cycles(eqn, chip, kind, pathlib.Path(dump))
            cycles[f"kernel {eqn.params['name']}"] += once * times
    print(json.dumps(cycles))


if __name__ == "__main__":
    main()
