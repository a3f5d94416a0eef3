"""The kernel for TPUs, interpreted, against XLA's operations; these are held to Swin elsewhere."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.encoders.swin import WindowAttention
from refseg_jax.models.layers import window_attention, window_kernel, window_strip
from refseg_jax.models.layers.window_attention import attend, attend_in_cudnn, attend_in_windows
from refseg_jax.models.layers.window_kernel import attend_in_kernel, fits_kernel
from refseg_jax.models.layers.windows import Windows
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)


def results(attention, windows, mesh, arrays):
    """y and the gradients of q, k, v, padding and bias, with the samples divided among `mesh`."""

    def function(cotangent, *arrays):
        y, pull_back = jax.vjp(lambda *arrays: attention(*arrays, windows), *arrays)
        return y, *pull_back(cotangent)

    samples, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    places = [samples] * 4 + [whole] * 2
    return jax.jit(on_mesh(mesh, function))(*map(jax.device_put, arrays, places))


@pytest.mark.parametrize(
    ("size", "side", "shift", "heads", "devices"),
    [
        # Whole windows, of a part of a register's lanes; 128 channels a head.
        ((8, 8), 4, 0, 2, 1),
        ((8, 8), 4, 2, 2, 1),
        ((10, 14), 4, 0, 8, 1),  # Padded on both sides.
        ((10, 14), 4, 2, 8, 2),
        ((5, 7), 4, 2, 8, 1),  # An odd number of cells in a row; a strip with one row of the map.
        ((3, 2), 4, 2, 8, 1),  # Smaller than a window.
        ((4, 28), 4, 0, 8, 1),  # Seven windows in a row: one at a time.
        ((5, 26), 4, 2, 8, 1),
        ((16, 8), 4, 2, 2, 1),  # More than three strips: one in a step.
        ((18, 14), 4, 0, 8, 1),
        ((18, 14), 4, 2, 8, 1),
        ((6, 42), 4, 2, 8, 1),  # So wide that all cells ask.
        ((19, 11), 4, 2, 8, 1),  # All do, as three of four are on the map.
        ((13, 26), 12, 6, 8, 1),  # More cells than lanes.
        ((8, 16), 16, 0, 4, 1),  # Two registers of cells.
    ],
)
def test_kernel(size, side, shift, heads, devices, interpreted):
    windows = Windows(size, side, shift)
    B, n, C = 2, size[0] * size[1], 256
    q, k, v, cotangent = RNG.normal(size=(4, B, n, C)).astype(np.float32)
    padding = RNG.normal(size=(2, C)).astype(np.float32)
    bias = RNG.normal(size=(heads, side**2, side**2)).astype(np.float32)
    arrays = cotangent, q / 8, k, v, padding, bias
    mesh = make_mesh(devices, 1)
    ours = results(attend_in_kernel, windows, mesh, arrays)
    theirs = results(attend_in_windows, windows, mesh, arrays)
    for a, b in zip(ours, theirs, strict=True):
        # Where sums cancel, their error is that of the numbers that they are of.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6 * np.abs(b).max())


@pytest.mark.parametrize("h", [9, 12])  # With and without cells below the map.
def test_wide_maps_go_strip_by_strip(h, interpreted, monkeypatch):
    windows = Windows((h, 14), 4, 2)
    q, k, v, cotangent = RNG.normal(size=(4, 2, h * 14, 128)).astype(np.float32)
    padding = RNG.normal(size=(2, 128)).astype(np.float32)
    bias = RNG.normal(size=(4, 16, 16)).astype(np.float32)
    arrays = cotangent, q / 8, k, v, padding, bias
    at_once = results(attend_in_kernel, windows, make_mesh(1, 1), arrays)
    monkeypatch.setattr(window_kernel, "_at_once", lambda windows, heads: False)
    jax.clear_caches()
    by_strips = results(attend_in_kernel, windows, make_mesh(1, 1), arrays)
    for a, b in zip(at_once, by_strips, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6 * np.abs(b).max())


def test_memory_is_read_after_it_is_written(monkeypatch):
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=interpret))
    windows = Windows((18, 14), 4, 2)
    q, k, v, cotangent = RNG.normal(size=(4, 2, 18 * 14, 128)).astype(np.float32)
    padding = RNG.normal(size=(2, 128)).astype(np.float32)
    bias = RNG.normal(size=(4, 16, 16)).astype(np.float32)
    arrays = cotangent, q / 8, k, v, padding, bias
    jax.clear_caches()  # Of kernels that were interpreted otherwise.
    for result in results(attend_in_kernel, windows, make_mesh(1, 1), arrays):
        assert np.isfinite(result).all()
    jax.clear_caches()


class Rows:
    """What the kernel has of an array of bfloat16: rows of registers. Interpreted, it cannot write
    to them."""

    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, at):
        return self.ref.bitcast(jnp.int32)[at]

    def __setitem__(self, at, rows):
        (_, place), whole = at, pltpu.bitcast(self.ref[0], jnp.int32)
        self.ref[0] = pltpu.bitcast(whole.at[place].set(rows), self.ref.dtype)


@pytest.mark.parametrize(("h", "w"), [(6, 10), (6, 7), (18, 10)])
def test_two_cells_of_bfloat16_share_a_row(h, w, interpreted, monkeypatch):
    monkeypatch.setattr(window_strip, "_as_rows", Rows)
    windows = Windows((h, w), 4, 2)
    q, k, v, cotangent = RNG.normal(size=(4, 2, h * w, 128))
    padding, bias = RNG.normal(size=(2, 128)), RNG.normal(size=(4, 16, 16))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (cotangent, q / 8, k, v, padding)]
    arrays.append(jnp.asarray(bias, jnp.float32))
    mesh = make_mesh(1, 1)
    ours = results(attend_in_kernel, windows, mesh, arrays)
    exact = results(attend_in_windows, windows, mesh, [x.astype(jnp.float32) for x in arrays])
    for a, b in zip(ours, exact, strict=True):
        # Weights and results have 8 bits.
        np.testing.assert_allclose(np.float32(a), b, atol=2e-2 * np.abs(b).max())


@pytest.mark.parametrize(
    ("size", "channels", "heads", "side", "shift", "dtype", "fits"),
    [
        ((24, 30), 128, 4, 12, 6, jnp.bfloat16, True),
        ((24, 30), 128, 4, 12, 6, jnp.float32, False),  # A TPU's products round it to bfloat16.
        ((24, 30), 128, 4, 7, 3, jnp.bfloat16, False),
        ((24, 30), 128, 4, 12, 3, jnp.bfloat16, False),
        ((24, 30), 96, 3, 12, 6, jnp.bfloat16, False),
        ((24, 30), 384, 8, 12, 6, jnp.bfloat16, False),  # 48 channels a head.
        ((24, 30), 128, 4, 16, 8, jnp.bfloat16, True),
        ((24, 30), 128, 8, 16, 8, jnp.bfloat16, False),  # 2 MiB of logits in a window.
        ((24, 192), 128, 4, 12, 6, jnp.bfloat16, True),
        ((24, 204), 128, 4, 12, 6, jnp.bfloat16, False),  # 12 MiB of strips.
    ],
)
def test_what_fits_the_kernel(size, channels, heads, side, shift, dtype, fits):
    windows = Windows(size, side, shift)
    array = jax.ShapeDtypeStruct((8, size[0] * size[1], channels), dtype)
    mesh = make_mesh(2, 1)
    assert on_mesh(mesh, fits_kernel)(array, heads, windows) == fits
    assert not fits_kernel(array, heads, windows)  # It is not known where the samples are.
    odd = jax.ShapeDtypeStruct((7, *array.shape[1:]), dtype)
    assert not on_mesh(mesh, fits_kernel)(odd, heads, windows)


def test_a_tpu_takes_the_kernel(like_a_tpu):
    attention = WindowAttention(4, 12, jnp.bfloat16)
    x = jnp.ones((2, 600, 128), jnp.bfloat16)
    variables = jax.eval_shape(lambda: attention.init(jax.random.key(0), x, (30, 20)))

    def jaxpr():
        function = on_mesh(make_mesh(2, 1), lambda v, x: attention.apply(v, x, (30, 20), 6))
        return str(jax.make_jaxpr(function)(variables, x))

    assert "pallas_call" in jaxpr() and "platform_index" in jaxpr()
    like_a_tpu()
    assert "pallas_call" in jaxpr() and "platform_index" not in jaxpr()


@pytest.mark.parametrize("form", ["gpu", "cudnn"])
@pytest.mark.parametrize(
    ("size", "side", "shift"), [((8, 12), 4, 0), ((8, 12), 4, 2), ((7, 10), 4, 2), ((3, 3), 4, 2)]
)
def test_forms_for_gpus(size, side, shift, form, monkeypatch):
    """In float32 they are equal; in bfloat16 their errors are not twice the other's."""
    windows, heads = Windows(size, side, shift), 3
    W, n = 2 * windows.rows * windows.columns, side**2
    rng = np.random.default_rng(0)
    arrays = list(rng.normal(size=(4, W, n, 24)).astype(np.float32))
    bias = rng.normal(size=(heads, n, n)).astype(np.float32)

    def results(attend, dtype=jnp.float32):
        q, k, v, cotangent = (x.astype(dtype) for x in arrays)
        attend = functools.partial(attend, regions=windows.regions())
        y, pull_back = jax.vjp(attend, q, k, v, bias)
        assert y.dtype == dtype
        return [np.float32(x) for x in (y, *pull_back(cotangent))]

    exact, theirs = results(attend), results(attend, jnp.bfloat16)
    monkeypatch.setattr(window_attention, "on_gpus", lambda: True)
    dot_product = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, implementation, **b: dot_product(*a, **b)
    )
    ours = attend_in_cudnn if form == "cudnn" else attend
    for a, b in zip(results(ours), exact, strict=True):
        assert not np.array_equal(a, b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    for a, b, c in zip(results(ours, jnp.bfloat16), theirs, exact, strict=True):
        assert np.abs(a - c).mean() < 2 * np.abs(b - c).mean()


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"cudnn": False}, False),
        ({"dtype": jnp.float32}, False),
        ({"window": 3}, False),  # An odd number of cells.
        ({"heads": 8}, False),  # Four channels a head.
        ({"devices": "NVIDIA A100, and nobody's mesh"}, False),
        ({"devices": "TPU v5 lite"}, False),
        ({"capability": "7.5"}, False),
        ({"capability": "12.0"}, True),
    ],
)
def test_what_goes_to_cudnn(change, taken, monkeypatch):
    """Where it does, `dot_product_attention` is asked for cuDNN's."""
    how = {"heads": 2, "window": 4, "dtype": jnp.bfloat16, "cudnn": True} | change
    devices, capability = how.pop("devices", "NVIDIA L4"), how.pop("capability", "8.9")
    asked = []

    def dot_product(q, k, v, bias, *, scale, implementation):
        asked.append(implementation)
        return q

    here = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product)
    gpu = jax.sharding.AbstractDevice(device_kind=devices, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=gpu)
    if "nobody" in devices:
        mesh = jax.sharding.AbstractMesh((), ())
    layer = WindowAttention(**how)
    with jax.sharding.use_abstract_mesh(mesh):
        x = jnp.zeros((1, 64, 32), jnp.bfloat16)
        jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, (8, 8), 2), x)
    assert asked == (["cudnn"] if taken else [])
