"""What would a GPU make of each config at its paper's size? Compiled here, without a GPU.

python -m benchmarks.gpu_compile [--config lavt,cris] [--gpu H200] [--gpus 1,8] [--step train,eval]
                                 [--batch 8] [--cudnn] [--hlo DIR]

In bfloat16. Needs the extra `cuda`, and no more of CUDA than comes with it. With --cudnn Swin's
windows go through cuDNN's attention (`swin.cudnn`). A JSON line per config, number of GPUs and
step, with "error" where it does not compile (the exit status is then 1). Nothing in it is measured:

- peak_gib: memory that one GPU needs for its rows, and `fits`, in the three quarters of it that JAX
  takes if it is not told otherwise;
- kernels: how many one GPU runs in a step, collectives not counted, and gbytes, what they read and
  write: each array once, also where rows of it are gathered or scattered again and again;
- loops_on_data: how many loops end where data says; they count as if they ran once;
- tflops: what of it are products and convolutions; model_tflops: those of the traced forward pass,
  times 3 for a train step;
- roofline_ms: what the kernels take if each takes as long as the memory at its full speed for what
  it reads and writes, or the tensor cores at their peak for its products, whichever is more;
  mfu: model_tflops over what those do in that time. A GPU will take longer: nothing reaches its
  peak, and to start a kernel takes a microsecond or more;
- collectives: of each kind, how many, and the MiB of their results in one GPU;
- worst: the operations of the most such time and their shares, those of like blocks together.

With a GPU at hand XLA tries which kernels are the fastest. Here it cannot, and has cuBLAS do all
products: it has kernels of its own for them, but some only once their sizes were tried.
"""

import argparse
import collections
import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # No GPU is looked for.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # There is no driver to ask.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.compiled import (
    BITS,
    COLLECTIVES,
    STEPS,
    Program,
    computations,
    names_among,
    place,
    result_bytes,
    trace_step,
)
from benchmarks.paper import CONFIGS, forward_flops, paper_config, positive
from refseg_jax.sharding import AXES

# XLA's own kernels for products need a GPU to try their sizes on.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class GPU(NamedTuple):
    """As NVIDIA describes it; `tflops` are those of dense products in bfloat16."""

    gib: float
    tflops: float
    gbytes: float  # Of the memory's traffic, per second.
    capability: tuple[int, int]
    processors: int
    shared: int  # Bytes of a processor's shared memory; a block can have 1024 less.
    threads: int  # Of a processor.
    l2: int  # Bytes.
    ghz: float


GPUS = {
    "A100": GPU(80, 312, 2039, (8, 0), 108, 164 << 10, 2048, 40 << 20, 1.41),
    "L4": GPU(22.5, 121, 300, (8, 9), 58, 100 << 10, 1536, 48 << 20, 2.04),
    "H100": GPU(80, 989, 3350, (9, 0), 132, 228 << 10, 2048, 50 << 20, 1.98),
    "H200": GPU(140, 989, 4800, (9, 0), 132, 228 << 10, 2048, 50 << 20, 1.98),
}
# Operations that are no kernels.
NONE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
NONE |= {"partition-id", "replica-id"}


def mesh_of(name: str, gpus: int) -> Mesh:
    """A data-parallel mesh of so many of `GPUS` in one host.

    Raises:
        NotImplementedError: JAX has no compiler for GPUs, which the extra `cuda` brings.
    """
    gpu = GPUS[name]
    major, minor = gpu.capability
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {gpu.shared} threads_per_core_limit: {gpu.threads}
          core_count: {gpu.processors} fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(gpu.gbytes * 1e9)} l2_cache_size: {gpu.l2}
          clock_rate_ghz: {gpu.ghz} device_memory_size: {int(gpu.gib * 2**30)}
          shared_memory_per_block_optin: {gpu.shared - 1024}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 patch: 0 }}
        device_description_str: "NVIDIA {name}"
    """
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{gpus}"
    ).devices
    return Mesh(np.array(devices).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


class Operation(NamedTuple):
    """A line of a program: `%name = type kind(%operands), ...`."""

    name: str
    type: str
    kind: str
    operands: list[str]
    line: str

    def shape(self) -> list[int]:
        """Of the result, or the first of them."""
        return [int(n) for n in BITS.search(self.type).group(3).split(",") if n]

    def names(self, attribute: str) -> list[str]:
        """Of computations, such as `calls=%fused`."""
        found = re.search(rf" {attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.line)
        return re.findall(r"[\w.\-]+", found.group(1) or found.group(2)) if found else []


def parse(line: str) -> Operation | None:
    """None: it is no operation."""
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, |$)", line)
    if not found:
        return None
    *about, operands = found.groups()
    return Operation(*about, re.findall(r"%([\w.\-]+)", operands), line)


class Kernel(NamedTuple):
    """What a kernel does at each run, and where in the model it comes from."""

    place: str
    runs: int
    flops: int
    bytes: int

    def seconds(self, gpu: GPU) -> float:
        """Of all runs, by the roofline."""
        most = max(self.bytes / (gpu.gbytes * 1e9), self.flops / (gpu.tflops * 1e12))
        return self.runs * most


class Kernels:
    """Those of a compiled program.

    Attributes:
      loops_on_data: how many loops end where data says, of those that were met.
    """

    def __init__(self, text: str):
        self.loops_on_data = 0
        lines, self._entry = computations(text)
        self._computations = {
            name: {op.name: op for op in map(parse, of) if op} for name, of in lines.items()
        }

    def __iter__(self) -> Iterator[Kernel]:
        return self._of(self._entry, 1)

    def _of(self, computation: str, runs: int) -> Iterator[Kernel]:
        operations = self._computations[computation]
        for op in operations.values():
            if op.kind in NONE or op.kind.endswith("-done"):
                continue
            if op.kind.removesuffix("-start") in COLLECTIVES:
                continue
            if op.kind == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.line)
                self.loops_on_data += not trips
                yield from self._of(*op.names("body"), runs * int(trips.group(1) if trips else 1))
            elif op.kind == "conditional":
                for branch in op.names("branch_computations"):
                    yield from self._of(branch, runs)
            elif op.kind == "call":
                yield from self._of(*op.names("to_apply"), runs)
            else:
                name = re.search(r'op_name="([^"]*)"', op.line)
                flops, read = self._work(op, operations)
                # Behind the results of a library's call is its scratch memory.
                written = result_bytes(re.sub(r", [su]8\[\d+\]\S*\)$", ")", op.type))
                yield Kernel(place(name.group(1) if name else ""), runs, flops, read + written)

    def _work(self, op: Operation, operations: dict[str, Operation]) -> tuple[int, int]:
        """(operations of products and convolutions, bytes that are read)."""
        if op.kind == "fusion":
            inner = self._computations[op.names("calls")[0]]
            flops = sum(product(each, inner) for each in inner.values() if each.kind == "dot")
            return flops, sum(map(self._read, op.names("calls")))
        operands = [operations[name] for name in op.operands]
        flops = product(op, operations) if op.kind in ("dot", "custom-call") else 0
        return flops, sum(result_bytes(each.type) for each in operands)

    def _read(self, fused: str) -> int:
        """Bytes of a fusion's parameters, of which only what is picked counts."""
        inner = self._computations[fused]

        def needed(op: Operation) -> int:
            users = [each for each in inner.values() if op.name in each.operands]
            picks = {"slice", "dynamic-slice", "gather"}
            if users and all(each.kind == "bitcast" for each in users):
                return min(result_bytes(op.type), sum(map(needed, users)))
            if users and all(u.kind in picks and u.operands[0] == op.name for u in users):
                return min(result_bytes(op.type), sum(result_bytes(u.type) for u in users))
            return result_bytes(op.type)

        return sum(needed(op) for op in inner.values() if op.kind == "parameter")


def product(op: Operation, operations: dict[str, Operation]) -> int:
    """Operations of a matrix product, a convolution or an attention; of any other call 0."""
    target = re.search(r'custom_call_target="__(cublas|cudnn)([^"]*)"', op.line)
    if op.kind != "dot" and not target:
        return 0
    library, call = target.groups() if target else ("cublas", "")
    left, right = (operations[name].shape() for name in op.operands[:2])
    if library == "cublas":
        found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', op.line)
        summed = [left[int(n)] for n in re.findall(r"\d+", found.group(1))]
        return 2 * math.prod(op.shape()) * math.prod(summed)
    if call.startswith("$fmha"):  # Of [B,T,heads,width].
        return 2 * (5 if "Backward" in call else 2) * math.prod(left) * right[1]
    # A convolution; of its backward passes, too, the labels are those of the forward pass.
    outputs = re.search(r"dim_labels=\w+->(\w+)", op.line).group(1)
    if "BackwardFilter" in call:
        of_output, kernel = right, op.shape()
    elif "BackwardInput" in call:
        of_output, kernel = left, right
    else:
        of_output, kernel = op.shape(), right
    pixels = math.prod(n for n, label in zip(of_output, outputs, strict=True) if label != "f")
    return 2 * pixels * math.prod(kernel)


def compile_row(
    name: str, step: str, gpu: str, gpus: int, flags: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """(the JSON line, the compiled program)."""
    row = {"config": name, "step": step, "gpu": gpu, "gpus": gpus, "batch_per_gpu": flags.batch}
    row["jax"] = jax.__version__
    config = paper_config(name, "bfloat16")
    if flags.cudnn:
        config.model.swin.cudnn = True
    flops = forward_flops(config) * flags.batch * (3 if step == "train" else 1)
    row["model_tflops"] = round(flops / 1e12, 3)
    traced = trace_step(config, step, mesh_of(gpu, gpus), flags.batch * gpus)
    try:
        compiled = traced.lower().compile(compiler_options=OPTIONS)
    except jax.errors.JaxRuntimeError as e:
        return row | {"error": " ".join(str(e).split())[:300]}, ""
    text = compiled.as_text()
    peak = compiled.memory_analysis().peak_memory_in_bytes / 2**30
    program = Kernels(text)
    kernels = list(program)
    seconds = collections.Counter()
    for kernel in kernels:
        seconds[kernel.place] += kernel.seconds(GPUS[gpu])
    total = seconds.total()
    row |= {
        "fits": peak < 0.75 * GPUS[gpu].gib,
        "peak_gib": round(peak, 2),
        "kernels": sum(kernel.runs for kernel in kernels),
        "gbytes": round(sum(kernel.runs * kernel.bytes for kernel in kernels) / 1e9, 1),
        "tflops": round(sum(kernel.runs * kernel.flops for kernel in kernels) / 1e12, 3),
        "loops_on_data": program.loops_on_data,
        "roofline_ms": round(1e3 * total, 2),
        "mfu": round(flops / (GPUS[gpu].tflops * 1e12 * total), 3),
        "collectives": {
            kind: {"count": count, "mib": round(size / 2**20, 1)}
            for kind, (count, size) in Program(text).collectives.items()
        },
        "worst": {name: round(s / total, 3) for name, s in seconds.most_common(5)},
    }
    return row, text


def main() -> int:
    """Returns the exit status."""
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=names_among(CONFIGS), default=CONFIGS)
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--gpus", type=names_among(("1", "2", "4", "8")), default=("1", "8"))
    parser.add_argument("--step", type=names_among(STEPS), default=STEPS)
    parser.add_argument("--batch", type=positive, default=8, help="rows per GPU")
    parser.add_argument("--cudnn", action="store_true", help="Swin's attention in cuDNN's kernels")
    parser.add_argument("--hlo", type=pathlib.Path, help="directory for the compiled programs")
    flags = parser.parse_args()
    try:
        mesh_of(flags.gpu, 1)
    except NotImplementedError:
        parser.error("no compiler for GPUs is installed: pip install -e .[cuda] brings it")
    failed = False
    for gpus, name, step in itertools.product(flags.gpus, flags.config, flags.step):
        if flags.cudnn and "swin" not in paper_config(name).model:
            continue
        row, text = compile_row(name, step, flags.gpu, int(gpus), flags)
        print(json.dumps(row), flush=True)
        failed |= "error" in row
        if flags.hlo:
            flags.hlo.mkdir(parents=True, exist_ok=True)
            (flags.hlo / f"{name}_{step}_{flags.gpu}_{gpus}.txt").write_text(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
