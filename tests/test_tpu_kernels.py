"""How many cycles our own kernels take on TPUs, by the instructions that they compile to."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu, which is for x86-64 Linux")

from benchmarks import tpu_kernels  # noqa: E402
from tests.conftest import REPO  # noqa: E402

# A kernel in a loop of 3, on a TPU only, and how many instructions its steps have together; one
# that loops in some of them.
KERNELS = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from benchmarks import tpu_compile, tpu_kernels
from refseg_jax.models.layers import attention_kernel
from refseg_jax.models.layers.window_kernel import attend_in_kernel, fits_kernel
from refseg_jax.models.layers.windows import Windows
from refseg_jax.sharding import on_mesh

dump = pathlib.Path(sys.argv[1])
tpu_kernels.write_down(dump)
mesh = tpu_compile.mesh_of("v5e:2x2")
chip = mesh.devices.flat[0]

def attend(x, padding, bias):
    attention = lambda x: attend_in_kernel(x, x, x, padding, bias, Windows((16, 8), 4))
    step = lambda x, _: (jax.lax.platform_dependent(x, tpu=attention, default=lambda x: x), None)
    return jax.lax.scan(step, x, length=3)[0]

arrays = jnp.zeros((8, 128, 256), jnp.bfloat16), jnp.zeros((2, 256)), jnp.zeros((8, 16, 16))
((kernel, times),) = tpu_kernels.kernels_of(jax.make_jaxpr(on_mesh(mesh, attend))(*arrays).jaxpr)
print(times, *kernel.params["grid_mapping"].grid, tpu_kernels.cycles_of(kernel, chip, dump))

def sums(often, x, y):
    @pl.when((pl.program_id(0) > 0) & (pl.program_id(1) == 2))
    def _():
        y[...] = jnp.zeros_like(y)
        def more(i, _):
            y[...] += jnp.exp(x[...])
        jax.lax.fori_loop(0, often, more, None)

for often in 10, 1000:
    call = pl.pallas_call(
        lambda x, y: sums(often, x, y),
        grid=(4, 5, 6),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j, k: (i, j))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 640), jnp.float32),
    )
    ((kernel, _),) = tpu_kernels.kernels_of(jax.make_jaxpr(call)(jnp.zeros((32, 640))).jaxpr)
    print(tpu_kernels.cycles_of(kernel, chip, dump))

# A loop whose end is data, at most 7 or 70, in a branch that data takes.
def sums_up_to(most, end, x, y):
    def more(i, _):
        y[...] += jnp.exp(x[...])
    @pl.when(end[0] > 3)
    def _():
        jax.lax.fori_loop(0, jnp.minimum(end[0], most), more, None)

for most in 7, 70:
    call = pl.pallas_call(
        lambda *refs: sums_up_to(most, *refs),
        grid=(4,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
    )
    arrays = jnp.zeros(1, jnp.int32), jnp.zeros((32, 128))
    ((kernel, _),) = tpu_kernels.kernels_of(jax.make_jaxpr(call)(*arrays).jaxpr)
    print(tpu_kernels.cycles_of(kernel, chip, dump))

def copy(x, y):
    y[...] = x[...]

call = pl.pallas_call(
    copy, grid=(8,), out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
    in_specs=[pl.BlockSpec((128, 1024), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((128, 1024), lambda i: (i, 0)),
)
((kernel, _),) = tpu_kernels.kernels_of(jax.make_jaxpr(call)(jnp.zeros((1024, 1024))).jaxpr)
print(tpu_kernels.chip_cycles(kernel, chip, tpu_compile.CHIPS["v5e"], dump))

# Products before and in a loop, of matrix units that do 8 operations per cycle.
def multiply(x, y):
    y[...] = jnp.dot(x[...], x[...])
    @pl.loop(0, 5)
    def _(i):
        y[...] += jnp.dot(x[...], x[...])

call = pl.pallas_call(
    multiply, grid=(4,), out_shape=jax.ShapeDtypeStruct((512, 128), jnp.float32),
    in_specs=[pl.BlockSpec((128, 128), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((128, 128), lambda i: (i, 0)),
)
((kernel, _),) = tpu_kernels.kernels_of(jax.make_jaxpr(call)(jnp.zeros((512, 128))).jaxpr)
print(tpu_kernels.cycles_of(kernel, chip, dump, 8))

# Both passes of the widest map that is said to fit.
for columns in range(100, 0, -1):
    windows = Windows((24, 12 * columns), 12, 6)
    q = jax.ShapeDtypeStruct((4, 24 * 12 * columns, 128), jnp.bfloat16)
    if on_mesh(mesh, lambda: fits_kernel(q, 4, windows))():
        break

def both(x, padding, bias):
    y, pull_back = jax.vjp(lambda *a: attend_in_kernel(a[0], *a, windows), x, x, padding, bias)
    return pull_back(y)

arrays = q, jnp.zeros((2, 128)), jnp.zeros((4, 144, 144))
kernels = tpu_kernels.kernels_of(jax.make_jaxpr(on_mesh(mesh, both))(*arrays).jaxpr)
for kernel, _ in kernels:
    tpu_kernels.bundles(kernel, kernel.params["jaxpr"], chip, dump)
print(columns, len(kernels))

# Both passes of as many cells as may attend to each other, and of as many as have the most logits
# at hand; of two heads at a time, and of the most that are likely.
for cells, heads in (attention_kernel.MOST_KEYS, 2), (attention_kernel.MOST_KEYS, 8), (2048, 2):

    def both(q, words):
        def attend(q, k, v):
            return attention_kernel.attend_in_kernel(q, k, v, words, heads, 0.1)

        y, pull_back = jax.vjp(attend, q, q, q)
        return pull_back(y)

    arrays = jnp.zeros((4, cells, 128), jnp.bfloat16), jnp.zeros((4, heads, 2), jnp.int32)
    kernels = tpu_kernels.kernels_of(jax.make_jaxpr(on_mesh(mesh, both))(*arrays).jaxpr)
    for kernel, _ in kernels:
        tpu_kernels.bundles(kernel, kernel.params["jaxpr"], chip, dump)
    print(len(kernels))
"""


def test_instructions_of_kernels(tmp_path):
    command = [sys.executable, "-c", KERNELS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert result.returncode == 0, result.stderr
    kernel, few, many, up_to_7, up_to_70, copied, multiplied, widest, *cells = (
        result.stdout.splitlines()
    )
    assert (widest, *cells) == ("16 2", "2", "2", "2")
    times, groups, samples, strips, cycles = map(int, kernel.split())
    assert (times, groups, samples, strips) == (3, 2, 2, 4)  # Of 256 channels and two samples.
    assert 100 < cycles / (groups * samples * strips) < 2000
    # The loop runs in 3 of 4, 1 of 5 and all of 6 steps of the grid's axes.
    once, rest = divmod(int(many) - int(few), 990 * 3 * 6)
    assert rest == 0 and 2 < once < 100
    assert int(few) > 4 * 5 * 6 * 10
    of_loop, rest = divmod(int(up_to_70) - int(up_to_7), 63 * 4)
    assert rest == 0 and 2 < of_loop < 100
    # Its instructions are fewer than the cycles in which the memory, at GB/s, reads and writes it.
    assert int(copied) == int(2 * 4 * 1024**2 * 1.5 / 819)
    assert int(multiplied) == 4 * 6 * 2 * 128**3 // 8


def kernel_of(body, *semantics):
    call = pl.pallas_call(
        body,
        grid=(3, 4),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics or None),
    )
    (equation,) = jax.make_jaxpr(call)(jnp.zeros((8, 128), jnp.int32)).eqns
    return equation


def test_cores_share_a_kernel_where_an_axis_says_so_and_divides():
    def share(*semantics):
        def copy(x, y):
            y[...] = x[...]

        return tpu_kernels.cores_that_share(kernel_of(copy, *semantics), 2)

    assert share("arbitrary", "parallel") == share("parallel", "parallel") == 2
    assert share("parallel", "arbitrary") == share("arbitrary", "arbitrary") == share() == 1


def test_a_loop_runs_as_often_as_it_may_or_is_named():
    def sums(start, end):
        def kernel(x, y):
            first, last = start(x[0, 0]), end(x[0, 0])
            y[0, 0] = jax.lax.fori_loop(first, last, lambda i, total: total + i, 0)

        return kernel_of(kernel).params["jaxpr"]

    for end in (lambda _: 7), (lambda n: jnp.minimum(n, 7)):
        for start in (lambda _: 0), (lambda n: n):
            assert tpu_kernels.straighten(sums(start, end), {}).lengths == (7,)
    with pytest.raises(ValueError, match=r"end at a number or at jnp.minimum\(data, number\)"):
        tpu_kernels.straighten(sums(lambda _: 0, lambda n: n), {})
