"""Multi-scale deformable attention against the released CUDA operator's PyTorch reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from refseg_jax.models.layers.deformable import MSDeformAttn, ms_deform_attn

POINTS = 4


@pytest.fixture(scope="module")
def golden(test_data):
    folder = test_data / "golden" / "msda"
    if not folder.is_dir():
        pytest.skip(f"no released outputs at {folder}")
    return folder


def shapes_of(arrays) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(int(n) for n in shape) for shape in arrays["spatial_shapes_hw"])


def relative_error(ours: jax.Array, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("form", ["gather", "matrix", "separable"])
def test_core_output_and_gradients(golden, form):
    arrays = np.load(golden / "core.npz")
    shapes = shapes_of(arrays)

    @jax.jit
    def core_and_gradients(value, locations, weights, cotangent):
        def core(value, locations, weights):
            return ms_deform_attn(value, shapes, locations, weights, form)

        output, pull_back = jax.vjp(core, value, locations, weights)
        return output, *pull_back(cotangent)

    inputs = ("value", "sampling_locations", "attention_weights", "cotangent")
    ours = core_and_gradients(*(arrays[name] for name in inputs))
    for name, array in zip(("output", "grad_value", "grad_loc", "grad_weights"), ours, strict=True):
        assert relative_error(array, arrays[name]) < 1e-5, name
    assert relative_error(ours[0], arrays["output_f64"]) < 1e-5


def module_variables(golden) -> dict:
    params = {}
    for name, array in load_file(golden / "module_state.safetensors").items():
        layer, kind = name.split(".")
        params.setdefault(layer, {})
        params[layer]["kernel" if kind == "weight" else kind] = array.T
    return {"params": params}


@pytest.mark.parametrize("padded", [False, True])
def test_module(golden, padded):
    arrays = np.load(golden / "module.npz")
    variables = module_variables(golden)
    shapes = shapes_of(arrays)
    dim = arrays["query"].shape[-1]
    heads = len(variables["params"]["attention_weights"]["bias"]) // (len(shapes) * POINTS)
    output = jax.jit(MSDeformAttn(dim, heads, len(shapes), POINTS).apply, static_argnums=4)(
        variables,
        arrays["query"],
        arrays["reference_points"],
        arrays["input_flatten"],
        shapes,
        jnp.asarray(~arrays["padding_mask"]) if padded else None,
    )
    assert relative_error(output, arrays["output" if padded else "output_nopad"]) < 1e-5
