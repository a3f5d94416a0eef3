"""What would a TPU make of each config at its paper's size? Compiled here, without a TPU.

python -m benchmarks.tpu_compile [--config lavt,cris] [--topology v5e:2x2] [--step train,eval]
                                 [--level O0] [--batch 8] [--dtype bfloat16] [--hlo DIR] [--update]

Needs `libtpu`, of the version that jax[tpu] names. A level is how hard the compiler tries: "O0"
takes a small part of the minutes of "default, -0.3", to a slow program, of which no cycles are
given. Where none is named it is the latter for one host of v5e, and elsewhere "O0" or, with
--update, the level of the row whose place is taken.

A JSON line per config, topology and step, of 8 rows per chip or --batch, with "error" where it does
not compile (the exit status is then 1). Without --batch there are more of the train steps for one
host of v5e, at "O0": of the most rows, a power of two, with which it fits, and of twice as many.
With --update they also replace their like in docs/scale.jsonl, of which docs/scale.md has its
tables; what is there already, of the same program, compiler and level, is left alone. All of it is
the compiler's estimate, and nothing a measurement:

- peak_gib: memory that one chip needs, and `fits`, in what it has;
- tflops, gbytes: work of one chip as the compiler counts it, and bytes that its operations read and
  write, in whichever memory; model_tflops: work of the products and convolutions by the shapes of
  the traced forward pass, times 3 for a train step;
- collectives: of each kind, how many, and the MiB of their results in one chip;
- mcycles: millions of estimated cycles, a loop's body counted as often as it runs, and for our own
  kernels the instructions that they compile to or what the memory takes for their arrays, whichever
  is more (benchmarks/tpu_kernels.py); share_of_peak:
  model_tflops over the most that the chip does in that time;
- worst: the operations of most cycles and their shares, those of like blocks taken together.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU to ask.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Nothing runs that could get in the way.
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh

from benchmarks.compiled import STEPS, Program, names_among, step_and_shapes
from benchmarks.paper import CONFIGS, forward_flops, paper_config, positive
from refseg_jax.sharding import AXES, compiler_options

# What a kernel is compiled from would name its source's files and lines, and the same program be
# another one wherever those are.
jax.config.update("jax_traceback_in_locations_limit", 0)

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
# JAX's optimisation level and effort of what the record names so. A little less effort than by
# default saves a fifth of the time and makes the same operations, but less of their machine code;
# with much less, the operations are others.
HARDEST = "default, -0.3"
LEVELS = {"O0": ("O0", 0.0), HARDEST: ("UNKNOWN", -0.3)}
ROWS = 8  # Per chip.
# Of these the record has cycles, for which it takes the higher level, and the most rows that fit.
ESTIMATED = ("v5e:2x2",)
# What of a row is known before it is compiled, and decides what comes out.
IDENTITY = ("program", "options", "libtpu")
# What is known before the step is lowered, and decides its program.
SOURCE = ("traced", "jax", "libtpu")


class Chip(NamedTuple):
    """A generation, as Google describes it, and topologies of one host and of 256 chips.

    `layout` is how a chip's cores are used, by libtpu's name: JAX takes the two of a v4 for one
    device, which is not what a topology has without that.
    """

    gib: float  # Memory.
    tflops: float  # In bfloat16.
    ghz: float  # Of the matrix units: tflops over what they do per cycle.
    gbytes: float  # Of the memory's traffic, per second.
    host: str
    pod: str
    layout: str = "default"


CHIPS = {
    "v4": Chip(32, 275, 1.05, 1228, "2x2x1", "4x8x8", "megacore"),
    "v5e": Chip(16, 197, 1.5, 819, "2x2", "16x16"),
    "v5p": Chip(95, 459, 1.75, 2765, "2x2x1", "4x8x8"),
    "v6e": Chip(32, 918, 1.75, 1640, "2x2", "16x16"),
}
EVERYWHERE = [f"{kind}:{n}" for kind, chip in CHIPS.items() for n in (chip.host, chip.pod)]


@contextlib.contextmanager
def compiling_at(level: str) -> Iterator[None]:
    """Compiles at one of `LEVELS`."""
    names = "jax_optimization_level", "jax_exec_time_optimization_effort"
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, LEVELS[level], strict=True):
            jax.config.update(name, value)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def fingerprint(*parts: str | bytes) -> str:
    """16 hexadecimal digits of SHA-256 of all `parts`, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:16]


def traced_fingerprint(traced: Any, shapes: Any) -> str:
    """Of what decides the program that a function, traced for `shapes`, is lowered to.

    The same program may have several: other tracing before may leave it other parts to share.
    """
    around = traced.args_info, traced.out_info, [x.sharding for x in jax.tree.leaves(shapes)]
    constants = constants_of(traced.jaxpr, set())
    return fingerprint(str(traced.jaxpr), *map(str, around), *constants)


def constants_of(jaxpr: Jaxpr | ClosedJaxpr, seen: set[int]) -> Iterator[bytes]:
    """The numbers that a jaxpr's text leaves out, of inner ones too, each jaxpr's once."""
    if id(jaxpr) in seen:
        return
    seen.add(id(jaxpr))
    if isinstance(jaxpr, ClosedJaxpr):
        yield from (np.asarray(x).tobytes() for x in jaxpr.consts)
        jaxpr = jaxpr.jaxpr
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, Jaxpr | ClosedJaxpr):
                yield from constants_of(inner, seen)


@functools.cache
def mesh_of(topology: str) -> Mesh:
    """A data-parallel mesh of all chips of `topology`, such as "v5e:4x4"."""
    layout = CHIPS[topology.partition(":")[0]].layout
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chip_config_name=layout
    ).devices
    return Mesh(np.array(devices).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


@functools.cache
def row_flops(name: str, dtype: str) -> int:
    """`forward_flops` of a config."""
    return forward_flops(paper_config(name, dtype))


def trace(
    name: str, step: str, topology: str, batch: int, dtype: str = "bfloat16"
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """(what is known before lowering, what lowers the step); `batch` rows per chip."""
    mesh, config = mesh_of(topology), paper_config(name, dtype)
    function, shapes = step_and_shapes(config, step, mesh, batch * mesh.size)
    flops = row_flops(name, dtype) * batch * (3 if step == "train" else 1)
    row = {"config": name, "step": step, "topology": topology, "chips": mesh.size}
    row |= {"batch_per_chip": batch, "dtype": dtype}
    row["model_tflops"] = round(flops / 1e12, 3)
    traced = function.trace(*shapes)
    row["traced"] = traced_fingerprint(traced, shapes)
    row |= {"options": compiler_options(mesh), "libtpu": importlib.metadata.version("libtpu")}
    return row | {"jax": jax.__version__}, functools.cache(traced.lower)


def is_known(row: dict[str, Any], lower: Callable[[], Any], recorded: dict[str, Any]) -> bool:
    """Whether to compile what `trace` returns could but give what is `recorded`, at its level.

    The row gets its program, before XLA. To lower a step takes as long as to trace it, so what is
    traced as what is recorded was is not lowered.
    """
    if all(row[name] == recorded.get(name) for name in SOURCE):
        row["program"] = recorded["program"]
    else:
        row["program"] = fingerprint(lower().as_text())
    return all(row[name] == recorded.get(name) for name in IDENTITY)


def estimate(
    row: dict[str, Any], lower: Callable[[], Any], level: str = "O0"
) -> tuple[dict[str, Any], str]:
    """(the whole row, the compiled program) of what `trace` returns, at one of `LEVELS`.

    Cycles are left out of a program that was not optimised, or loops as often as data says.
    """
    chip = CHIPS[row["topology"].partition(":")[0]]
    row = row | {"level": level}
    try:
        with compiling_at(level):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as e:
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or not used:
            raise
        peak = float(used.group(1)) / (1 if used.group(2) == "G" else 1024)
        return row | {"fits": False, "peak_gib": round(peak, 2)}, ""
    text, costs = compiled.as_text(), compiled.cost_analysis()
    program = Program(text)
    peak = compiled.memory_analysis().peak_memory_in_bytes / 2**30
    row |= {
        "fits": peak < chip.gib,
        "peak_gib": round(peak, 2),
        "tflops": round(costs["flops"] / 1e12, 3),
        "gbytes": round(costs["bytes accessed"] / 1e9, 1),
        "collectives": {
            kind: {"count": count, "mib": round(size / 2**20, 1)}
            for kind, (count, size) in program.collectives.items()
        },
    }
    if level != "O0" and not program.loops_on_data:
        if "tpu_custom_call" in text:
            from benchmarks.tpu_kernels import kernel_cycles

            names = "config", "step", "topology", "batch_per_chip", "dtype"
            program.cycles.update(kernel_cycles(*(row[name] for name in names)))
        cycles = program.cycles.total()
        row["mcycles"] = round(cycles / 1e6, 2)
        row["share_of_peak"] = share_of_peak(row)
        row["worst"] = {name: round(n / cycles, 3) for name, n in program.cycles.most_common(5)}
    return row, text


def share_of_peak(row: dict[str, Any]) -> float:
    """Of a row with cycles."""
    chip = CHIPS[row["topology"].partition(":")[0]]
    most = chip.tflops * row["mcycles"] / (chip.ghz * 1e3)
    return round(row["model_tflops"] / most, 3)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of such rows: what each step takes on each topology, and its worst operations.

    And of train steps the most rows per chip that fit, of those that were compiled.
    """
    lines = [
        "| config | step | topology | rows per chip | level | fits | GiB | TFLOP (model's own) | "
        "GB | collectives (MiB) | Mcycles | share of peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["batch_per_chip"] != ROWS and "mcycles" not in row:
            continue
        collectives = ", ".join(
            f"{kind['count']} {name} ({kind['mib']})"
            for name, kind in row.get("collectives", {}).items()
        )
        cells = [row["config"], row["step"], row["topology"], row["batch_per_chip"], row["level"]]
        cells += ["yes" if row["fits"] else "no", row["peak_gib"]]
        cells += [f"{row.get('tflops', '')} ({row['model_tflops']})", row.get("gbytes", "")]
        cells += [collectives, row.get("mcycles", "")]
        cells += [f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| config | step | topology | worst operations, share of the cycles |"]
    lines += ["|---|---|---|---|"]
    for row in rows:
        worst = "<br>".join(f"{n:.1%} `{name}`" for name, n in row.get("worst", {}).items())
        if worst and row["batch_per_chip"] == ROWS:
            lines.append(f"| {row['config']} | {row['step']} | {row['topology']} | {worst} |")
    lines += ["", "| config | topology | most rows per chip | GiB | twice as many need |"]
    lines += ["|---|---|---|---|---|"]
    for name, topology in itertools.product(CONFIGS, ESTIMATED):
        of = name, STEPS.index("train"), topology
        sizes = {row["batch_per_chip"]: row for row in rows if key(row)[:3] == of}
        most = max((batch for batch, row in sizes.items() if row["fits"]), default=None)
        if most is None:  # The first table says what it needs.
            continue
        twice = sizes[2 * most]["peak_gib"] if 2 * most in sizes else ""
        cells = name, topology, most, sizes[most]["peak_gib"], twice
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row of docs/scale.jsonl is of, and where it stands there."""
    return row["config"], STEPS.index(row["step"]), row["topology"], row["batch_per_chip"]


def read_record() -> dict[tuple[Any, ...], dict[str, Any]]:
    """docs/scale.jsonl, by `key`."""
    lines = (DOCS / "scale.jsonl").read_text().splitlines()
    return {key(row): row for row in map(json.loads, lines)}


def update(rows: list[dict[str, Any]]) -> None:
    """Puts `rows` in the place of their like in docs/scale.jsonl, and its tables in scale.md."""
    merged = read_record() | {key(row): row for row in rows}
    merged = [merged[k] for k in sorted(merged)]
    (DOCS / "scale.jsonl").write_text("".join(json.dumps(row) + "\n" for row in merged))
    page = DOCS / "scale.md"
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table(merged)}\n\n{end}{after}")


def topologies_among(text: str) -> list[str]:
    """For argparse: topologies that libtpu knows, with commas between."""
    names = text.split(",")
    for name in names:
        names_among(tuple(CHIPS))(name.partition(":")[0])
        try:
            mesh_of(name)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as e:
            reason = " ".join(str(e).split())
            message = f"{name!r} is no topology such as {EVERYWHERE[0]}: {reason}"
            raise argparse.ArgumentTypeError(message) from e
    return names


def make_row(
    flags: argparse.Namespace,
    name: str,
    step: str,
    topology: str,
    batch: int,
    level: str | None,
    otherwise: str = "O0",
) -> dict[str, Any] | None:
    """The row of a step, which is printed, recorded and written down as `flags` say.

    Without a `level` it is `otherwise`, or that of the row whose place it takes if that is higher.
    None: it does not compile.
    """
    row, lower = trace(name, step, topology, batch, flags.dtype)
    recorded = read_record().get(key(row), {}) if flags.update else {}
    level = level or (recorded["level"] if recorded and otherwise == "O0" else otherwise)
    # Who tried harder knows the rest, too.
    if is_known(row, lower, recorded) and recorded["level"] in (level, HARDEST):
        row = recorded | row  # The model's own work may be counted otherwise by now.
        if "mcycles" in row:
            row["share_of_peak"] = share_of_peak(row)
        update([row])
        print(f"{name} {step} {topology} {batch}: known", file=sys.stderr)
        return row
    try:
        row, text = estimate(row, lower, level)
    except jax.errors.JaxRuntimeError as e:
        print(json.dumps(row | {"error": " ".join(str(e).split())[:300]}), flush=True)
        return None
    print(json.dumps(row), flush=True)
    if flags.update:
        update([row])
    if flags.hlo:
        flags.hlo.mkdir(parents=True, exist_ok=True)
        file = f"{name}_{step}_{topology.replace(':', '_')}_{batch}.txt"
        (flags.hlo / file).write_text(text)
    return row


def larger_batches(row: dict[str, Any]) -> Iterator[int]:
    """Rows per chip, each twice the last, to look for the most that fit where those of `row` do.

    The first fit even if the memory grew as the rows do, unless they are but twice `row`'s.
    """
    room = CHIPS[row["topology"].partition(":")[0]].gib / row["peak_gib"]
    doublings = max(1, math.floor(math.log2(room)))
    return (row["batch_per_chip"] << n for n in itertools.count(doublings))


def main() -> int:
    """Returns the exit status."""
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=names_among(CONFIGS), default=CONFIGS)
    parser.add_argument("--topology", type=topologies_among, default=EVERYWHERE)
    parser.add_argument("--step", type=names_among(STEPS), default=STEPS)
    parser.add_argument("--level", choices=LEVELS)
    parser.add_argument("--batch", type=positive, help="rows per chip")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hlo", type=pathlib.Path, help="directory for the compiled programs")
    parser.add_argument("--update", action="store_true", help="docs/scale.md and its .jsonl")
    if not importlib.util.find_spec("libtpu") and not {"-h", "--help"} & set(sys.argv):
        parser.error("no compiler for TPUs is installed: pip install 'jax[tpu]' brings it")
    flags = parser.parse_args()
    if flags.update and flags.dtype != "bfloat16":
        parser.error("--update: the record is of bfloat16")
    if flags.update:
        update([])
    failed = False
    for topology, name, step in itertools.product(flags.topology, flags.config, flags.step):
        otherwise = HARDEST if topology in ESTIMATED else "O0"
        row = make_row(flags, name, step, topology, flags.batch or ROWS, flags.level, otherwise)
        if not flags.batch and step == "train" and topology in ESTIMATED and row and row["fits"]:
            for batch in larger_batches(row):
                row = make_row(flags, name, step, topology, batch, "O0")
                if not row or not row["fits"]:
                    break
        failed |= row is None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
