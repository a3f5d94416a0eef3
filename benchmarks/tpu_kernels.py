"""How long do a step's own kernels take on a TPU? By the instructions that they compile to.

XLA estimates cycles for its operations, but has none for a kernel that it is given. So
benchmarks/tpu_compile.py starts this as a process of its own, in which libtpu writes down the
instructions of each kernel, compiled by itself: one bundle of them per cycle, as often as the
kernel's grid has steps, which a chip's cores share.

    python -m benchmarks.tpu_kernels CONFIG STEP TOPOLOGY ROWS_PER_CHIP DTYPE

prints a JSON object of the cycles of one chip by kernel.
"""

import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import SingleDeviceSharding

from benchmarks.paper import jaxprs_in_params, paper_config
from benchmarks.tpu_compile import mesh_of, trace_step


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
                key = f"{eqn.params['name']} {shapes}"
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


def bundles(eqn: JaxprEqn, device: jax.Device, dump: pathlib.Path) -> int:
    """Instructions of one step of a kernel's grid, from what libtpu writes down in `dump`."""
    sharding = SingleDeviceSharding(device)
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=sharding) for v in eqn.invars
    ]
    known = set(dump.iterdir())

    def alone(*arrays):
        return eqn.primitive.bind(*arrays, **eqn.params)

    jax.jit(alone).lower(*shapes).compile()
    # The kernel is named after the function; beside it are copies to the layouts that it wants.
    (report,) = set(dump.glob("*-alone.*-schedule-analysis_final_bundles.txt")) - known
    return int(re.search(r"total scheduled bundles:\s+(\d+)", report.read_text()).group(1))


def main() -> None:
    name, step, topology, rows, dtype = sys.argv[1:]
    with tempfile.TemporaryDirectory() as dump:
        write_down(pathlib.Path(dump))
        mesh = mesh_of(topology)
        traced = trace_step(paper_config(name, dtype), step, mesh, int(rows) * mesh.size)
        cycles = collections.Counter()
        chip = mesh.devices.flat[0]
        for eqn, times in kernels_of(traced.jaxpr.jaxpr):
            steps = math.prod(eqn.params["grid_mapping"].grid) * times // chip.num_cores
            one = bundles(eqn, chip, pathlib.Path(dump))
            cycles[f"kernel {eqn.params['name']}"] += one * steps
    print(json.dumps(cycles))


if __name__ == "__main__":
    main()
