"""Building blocks: against PyTorch and transformers where they have the same, else by property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers.attention import MultiHeadAttention
from refseg_jax.models.layers.decoder import class_difference
from refseg_jax.models.layers.deformable import (
    DeformableEncoder,
    MSDeformAttn,
    ms_deform_attn,
    pixel_centres,
)
from refseg_jax.models.layers.mlp import MLP
from refseg_jax.models.layers.norms import instance_norm, moments_at_once
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.resize import resize_bilinear, resized_conv
from refseg_jax.models.layers.transformer import DecoderLayer

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def linear(layer) -> dict:
    """Parameters of a torch Linear or LayerNorm as Flax names and lays them out."""
    weight = layer.weight.detach().numpy()
    kind = "kernel" if weight.ndim == 2 else "scale"
    return {kind: weight.T, "bias": layer.bias.detach().numpy()}


def randomise(module) -> None:
    """No parameter keeps an initial 0 or 1 that would hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def test_mlp_widths_and_dropout():
    mlp = MLP((8, 5), dropout=0.5)
    x = jnp.asarray(normal(2, 3, 4))
    variables = mlp.init(jax.random.key(0), x)
    quiet = mlp.apply(variables, x)
    noisy = mlp.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert quiet.shape == (2, 3, 5)
    assert not np.allclose(quiet, noisy)


# Attention and the decoder layer.


def attention_params(layer) -> dict:
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    params = {
        name: {"kernel": weight.detach().numpy().T, "bias": bias.detach().numpy()}
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    }
    return {**params, "out": linear(layer.out_proj)}


def test_decoder_layer_equals_torch():
    dim, heads, ffn_dim = 16, 4, 24
    layer = torch.nn.TransformerDecoderLayer(dim, heads, ffn_dim, batch_first=True).eval()
    randomise(layer)
    queries, memory = normal(2, 3, dim), normal(2, 7, dim)
    mask = np.arange(7) < np.array([[5], [7]])
    with torch.no_grad():
        theirs = layer(
            torch.tensor(queries),
            torch.tensor(memory),
            memory_key_padding_mask=torch.tensor(~mask),
        )
    params = {
        "self_attention": attention_params(layer.self_attn),
        "self_attention_end": {"norm": linear(layer.norm1)},
        "cross_attention": attention_params(layer.multihead_attn),
        "cross_attention_end": {"norm": linear(layer.norm2)},
        "feed_forward": {
            "mlp": {"Dense_0": linear(layer.linear1), "Dense_1": linear(layer.linear2)},
            "end": {"norm": linear(layer.norm3)},
        },
    }
    ours = DecoderLayer(dim, heads, ffn_dim).apply(
        {"params": params}, queries, memory, memory_mask=mask
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_decoder_positions_reach_queries_and_keys_but_not_values():
    layer = DecoderLayer(8, 2, 8)
    queries, memory = normal(1, 3, 8), normal(1, 5, 8)
    variables = layer.init(jax.random.key(0), queries, memory)

    def change(**positions):
        plain = layer.apply(variables, queries, memory)
        return float(jnp.abs(layer.apply(variables, queries, memory, **positions) - plain).max())

    assert change(query_positions=normal(3, 8)) > 1e-3
    assert change(key_positions=normal(5, 8)) > 1e-3
    # The same shift of every key changes no softmax: it would show if it reached the values.
    assert change(key_positions=np.ones((5, 8), np.float32)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_mask_and_dtype(dtype):
    attention = MultiHeadAttention(8, 2, dtype)
    queries, keys = normal(2, 3, 5), normal(2, 4, 6)
    mask = np.array([[True, True, False, False], [False] * 4])
    variables = attention.init(jax.random.key(0), queries, keys, keys)
    output = attention.apply(variables, queries, keys, keys, mask)
    changed = np.where(mask[..., None], keys, 9.0)
    assert output.dtype == dtype and output.shape == (2, 3, 8)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    assert np.isfinite(np.asarray(output, np.float32)).all()
    np.testing.assert_array_equal(
        output[0], attention.apply(variables, queries, changed, changed, mask)[0]
    )


def test_attention_names_a_bad_width():
    with pytest.raises(ValueError, match="width 9 is not a multiple of 2 heads"):
        MultiHeadAttention(9, 2).init(jax.random.key(0), *[jnp.ones((1, 2, 4))] * 3)


# Positions and resizing.


def test_sine_positions_equal_those_of_detr():
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    module = modeling.Mask2FormerSinePositionEmbedding(num_position_features=8, normalize=True)
    theirs = module((2, 3, 5, 7), torch.device("cpu"), torch.float32)
    theirs = np.asarray(theirs)[0]
    theirs = theirs.reshape(16, -1).T if theirs.shape[0] == 16 else theirs
    np.testing.assert_allclose(sine_positions(5, 7, 16), theirs, atol=1e-5)


def test_sine_positions_name_a_bad_width():
    with pytest.raises(ValueError, match="multiple of 4, not 10"):
        sine_positions(2, 2, 10)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (7, 5), (1, 9), (3, 10)])
def test_resize_equals_torch(size, align_corners):
    x = normal(2, 6, 10, 3)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=align_corners
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize_bilinear(x, size, align_corners), theirs, atol=1e-5)
    np.testing.assert_allclose(
        resize_bilinear(x[..., 0], size, align_corners), theirs[..., 0], atol=1e-5
    )


@pytest.mark.parametrize("on_tpu", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(12, 20), (11, 13), (6, 10)])
def test_resized_conv_equals_torch(size, align_corners, on_tpu, like_a_tpu):
    if on_tpu:
        like_a_tpu()
    x, kernel = normal(2, 6, 10, 4), normal(3, 3, 4, 5)
    resized = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=align_corners
    )
    weight = torch.tensor(kernel).permute(3, 2, 0, 1)
    theirs = torch.nn.functional.conv2d(resized, weight, padding=1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resized_conv(x, kernel, size, align_corners), theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_class_difference(dtype, like_a_tpu):
    x, kernel, bias = jnp.asarray(normal(2, 3, 5, 16), dtype), normal(16, 2), normal(2)
    cotangent = normal(2, 3, 5)

    def both(function):
        y, pull_back = jax.vjp(lambda *arrays: function(*arrays), x, kernel, bias)
        return y, *pull_back(cotangent)

    def plain(x, kernel, bias):
        logits = x.astype(jnp.float32) @ kernel.astype(dtype).astype(jnp.float32) + bias
        return logits[..., 1] - logits[..., 0]

    like_a_tpu()
    text = str(jax.make_jaxpr(lambda: both(class_difference))())
    assert ("bf16[16,8]" in text) == (dtype == jnp.bfloat16)  # Eight columns.
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    for ours, theirs in zip(both(class_difference), both(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_resize_keeps_dtype():
    assert resize_bilinear(jnp.ones((1, 2, 2), jnp.bfloat16), (4, 4)).dtype == jnp.bfloat16


# Deformable attention; its parity with the released operator is in golden/test_msda.py.

SHAPES = ((6, 5), (3, 4), (2, 3))


@pytest.mark.parametrize("form", ["gather", "matrix", "separable"])
def test_sampling_at_pixel_centres_reads_pixels(form):
    count = len(pixel_centres(SHAPES))
    value = normal(2, count, 3, 2)
    locations = np.broadcast_to(
        pixel_centres(SHAPES)[None, :, None, None, None], (2, count, 3, len(SHAPES), 1, 2)
    )
    # Each query reads only its own level.
    own_level = np.repeat(np.eye(len(SHAPES)), [h * w for h, w in SHAPES], axis=0)
    weights = np.broadcast_to(own_level[None, :, None, :, None], locations.shape[:-1])
    output = ms_deform_attn(value, SHAPES, locations, weights.astype(np.float32), form)
    np.testing.assert_allclose(output, value.reshape(2, count, 6), atol=1e-5)


def test_sampling_rejects_levels_that_do_not_fit():
    with pytest.raises(ValueError, match="do not make up the 7 positions"):
        ms_deform_attn(jnp.ones((1, 7, 1, 1)), ((2, 3),), jnp.ones(()), jnp.ones(()))


def test_sampling_rejects_an_unknown_form():
    with pytest.raises(ValueError, match="'scatter' is not one of gather, matrix, separable"):
        ms_deform_attn(jnp.ones((1, 6, 1, 1)), ((2, 3),), jnp.ones(()), jnp.ones(()), "scatter")


def test_gradients_at_full_size():
    """Large arrays have crashed XLA's CPU backend before: see `_bilinear_taps`."""
    shapes = ((60, 60), (30, 30), (15, 15))
    centres = jnp.asarray(pixel_centres(shapes))
    value = jnp.ones((1, len(centres), 8, 4))
    weights = jnp.ones((1, len(centres), 8, 3, 4))

    @jax.jit
    @jax.grad
    def gradient(locations):
        return ms_deform_attn(value, shapes, locations, weights).sum()

    locations = jnp.broadcast_to(centres[:, None, None, None], (*weights.shape, 2))
    assert np.isfinite(gradient(locations)).all()


def test_first_offsets_form_rings():
    module = MSDeformAttn(dim=8, heads=4, levels=2, points=3)
    query = jnp.ones((1, 2, 8))
    variables = module.init(
        jax.random.key(0), query, jnp.full((1, 2, 2, 2), 0.5), jnp.ones((1, 6, 8)), ((2, 2), (1, 2))
    )
    params = variables["params"]
    offsets = params["sampling_offsets"]["bias"].reshape(4, 2, 3, 2)
    assert not params["sampling_offsets"]["kernel"].any()
    assert not params["attention_weights"]["kernel"].any()
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(3):
            expected = np.tile((point + 1) * np.array(direction), (2, 1))
            np.testing.assert_allclose(offsets[head, :, point], expected, atol=1e-6)


def encoder_params(module) -> dict:
    """Parameters of a transformers Mask2Former pixel-decoder encoder."""
    params = {}
    for i, layer in enumerate(module.layers):
        attention = layer.self_attn
        params[f"layer{i}"] = {
            "attention": {
                name: linear(getattr(attention, name))
                for name in ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
            },
            "attention_end": {"norm": linear(layer.self_attn_layer_norm)},
            "feed_forward": {
                "mlp": {"Dense_0": linear(layer.fc1), "Dense_1": linear(layer.fc2)},
                "end": {"norm": linear(layer.final_layer_norm)},
            },
        }
    return params


@pytest.fixture(scope="module")
def encoder():
    """Ours and transformers' encoder with the same random parameters."""
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    config = modeling.Mask2FormerConfig(
        feature_size=16, encoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=24
    )
    config._attn_implementation = "eager"
    theirs = modeling.Mask2FormerPixelDecoderEncoderOnly(config).eval()
    randomise(theirs)
    ours = DeformableEncoder(layers=2, dim=16, heads=2, ffn_dim=24)
    params = {**encoder_params(theirs), "level_embedding": normal(len(SHAPES), 16)}
    return ours, {"params": params}, theirs


def test_encoder_equals_transformers(encoder):
    ours, variables, theirs = encoder
    features = [normal(2, *shape, 16) for shape in SHAPES]
    outputs = jax.jit(ours.apply)(variables, features)
    assert [x.shape for x in outputs] == [x.shape for x in features]

    def flatten(maps):
        return np.concatenate([np.reshape(x, (x.shape[0], -1, 16)) for x in maps], axis=1)

    level_embedding = variables["params"]["level_embedding"]
    positions = flatten(
        [
            np.tile(sine_positions(*shape, 16) + level_embedding[i], (2, 1, 1))
            for i, shape in enumerate(SHAPES)
        ]
    )
    sizes = [h * w for h, w in SHAPES]
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=torch.tensor(flatten(features)),
            attention_mask=torch.zeros(2, sum(sizes), dtype=torch.bool),
            position_embeddings=torch.tensor(positions),
            spatial_shapes_list=list(SHAPES),
            level_start_index=torch.tensor(np.cumsum([0, *sizes[:-1]])),
            valid_ratios=torch.ones(2, len(SHAPES), 2),
        ).last_hidden_state
    np.testing.assert_allclose(flatten(outputs), expected, atol=5e-5)


def test_encoder_remat_and_bf16(encoder):
    ours, variables, _ = encoder
    features = [normal(1, *shape, 16) for shape in SHAPES]

    def value_and_gradients(module):
        def loss(params):
            return sum((x**2).sum() for x in module.apply({"params": params}, features))

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    def recomputed(module):
        jaxpr = jax.make_jaxpr(module.apply)(variables, features)
        return sum(
            "checkpoint" in e.primitive.name or "remat" in e.primitive.name for e in jaxpr.eqns
        )

    assert (recomputed(ours), recomputed(ours.clone(remat=True))) == (0, ours.layers)
    plain = value_and_gradients(ours)
    remat = value_and_gradients(ours.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, remat)
    low = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)(variables, features)
    for a, b in zip(low, jax.jit(ours.apply)(variables, features), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).mean() < 0.05


@pytest.mark.parametrize("guess, tolerance", [(0.0, 1e-3), (90.0, 1e-5)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2)])
def test_moments_in_one_pass_are_those_of_two(axes, guess, tolerance):
    """What accelerators compute: on a CPU `moments` takes the other way."""
    x = 100 + 3 * jax.random.normal(jax.random.key(0), (2, 5, 6, 4))

    def results(moments):
        pull = jax.random.normal(jax.random.key(1), x.mean(axes).shape)
        values, vjp = jax.vjp(moments, x)
        return *values, *vjp((pull, pull[::-1]))

    once = results(lambda x: moments_at_once(x, axes, jnp.full(4, guess)))
    twice = results(lambda x: (x.mean(axes), x.var(axes)))
    for ours, exact in zip(once, twice, strict=True):
        assert np.abs(ours - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_instance_norm_far_from_zero(dtype, like_a_tpu):
    x = jnp.asarray(normal(2, 500, 3) * [1, 0.1, 4] + [10, -1, 50], dtype)
    cotangent = jnp.asarray(normal(*x.shape), dtype)

    def plain(x):
        d = x - x.mean(1, keepdims=True)
        return d / jnp.sqrt((d * d).mean(1, keepdims=True) + 1e-5)

    def results(function, x, cotangent):
        y, pull_back = jax.vjp(function, x)
        return y, *pull_back(cotangent)

    exact = results(plain, *(jnp.float32(a) for a in (x, cotangent)))
    like_a_tpu()
    # bfloat16 results have 8 bits.
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
    for ours, theirs in zip(results(instance_norm, x, cotangent), exact, strict=True):
        assert ours.dtype == dtype
        limit = tolerance * np.abs(theirs).max()
        np.testing.assert_allclose(np.float32(ours), theirs, rtol=tolerance, atol=limit)
