"""CoupAlign: its equations as slow loops, its variants, and its size in the paper's recipe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import coupalign
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.losses.pixel_contrast import pixel_contrast_loss
from refseg_jax.models.coupalign import (
    SMA,
    WPA,
    CoupAlignConfig,
    CrossAttention,
    MaskGenerator,
    SegHead,
)
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.transformer import DecoderLayer
from refseg_jax.optim import assign_groups, make_schedule
from refseg_jax.train_state import init_variables
from tests.equations import RNG, apply, close, init, linear, normal, randomise, softmax

# Equations.


@pytest.mark.parametrize("update_language", [True, False])
def test_wpa_is_eq_1_to_6(update_language):
    h, w, T, C, D, d = 2, 3, 4, 6, 8, 5
    vision, language = normal(1, h, w, C), normal(1, T, D)
    token_mask = np.array([[True, True, True, False]])
    module = WPA(d, update_language, shut_gates=False)
    variables = init(module, vision, language, token_mask)
    params = variables["params"]
    assert ("language_gate" in params) == update_language
    updated, said, attention = apply(module, variables, vision, language, token_mask)

    def gated(x, response, gate):
        hidden = np.maximum(linear(response, gate["fc1"]), 0)
        return x + np.tanh(linear(hidden, gate["fc2"])) * response

    v = [linear(x, params["vision_in"]) for x in vision[0].reshape(-1, C)]
    l = [linear(x, params["language_in"]) for x in language[0]]  # noqa: E741
    scores = np.array([[v[s] @ l[t] / np.sqrt(d) for t in range(T)] for s in range(h * w)])
    for s in range(h * w):
        over_words = softmax(scores[s, :3])  # The fourth is padding.
        response = linear(sum(over_words[t] * l[t] for t in range(3)), params["vision_out"])
        row, column = divmod(s, w)
        close(
            updated[0, row, column], gated(vision[0, row, column], response, params["vision_gate"])
        )
    for t in range(T):
        over_pixels = softmax(scores[:, t])
        close(attention[0, t].ravel(), over_pixels)
        if update_language:
            gathered = sum(over_pixels[s] * v[s] for s in range(h * w))
            response = linear(gathered, params["language_out"])
            close(said[0, t], gated(language[0, t], response, params["language_gate"]))
    if not update_language:
        np.testing.assert_array_equal(said, language)


def test_cross_attention_is_eq_7_and_8():
    h, w, T, C, D, heads = 2, 3, 3, 5, 8, 2
    vision, language = normal(1, h, w, C), normal(1, T, D)
    token_mask = np.array([[True, True, False]])
    module = CrossAttention(heads, grid=1)
    variables = randomise(init(module, vision, language, token_mask))
    params = variables["params"]
    ours = apply(module, variables, vision, language, token_mask)

    # A grid of one position is the same everywhere once resized.
    position = np.asarray(params["positions"])[0, 0]
    rows = [linear(x, params["vision_in"]) + position for x in vision[0].reshape(-1, C)]
    rows += [linear(x, params["language_in"]) for x in language[0][token_mask[0]]]
    attention = params["attention"]
    query, key, value = (
        [linear(x, attention[name]).reshape(heads, -1) for x in rows]
        for name in ("query", "key", "value")
    )
    for s in range(h * w):
        seen = []
        for head in range(heads):
            weights = softmax(
                np.array([query[s][head] @ k[head] for k in key]) / np.sqrt(D / heads)
            )
            seen.append(sum(p * x[head] for p, x in zip(weights, value, strict=True)))
        out = linear(linear(np.concatenate(seen), attention["out"]), params["vision_out"])
        row, column = divmod(s, w)
        close(ours[0, row, column], vision[0, row, column] + out)


def test_positions_are_added_to_the_pixels_and_resized_to_another_grid():
    vision, language = normal(1, 2, 2, 4), normal(1, 3, 4)
    token_mask = np.ones((1, 3), bool)
    module = CrossAttention(1, grid=2)
    variables = init(module, vision, language, token_mask)
    nudge = normal(2, 2, 4)
    by_pixels = apply(module, variables, vision + nudge, language, token_mask) - nudge
    params = {**variables["params"]}
    assert params["positions"].shape == (2, 2, 4)
    params["positions"] += linear(nudge, {"kernel": params["vision_in"]["kernel"]})
    close(apply(module, {"params": params}, vision, language, token_mask), by_pixels)

    # On a map of 4 x 4 it is the grid's bilinear enlargement that is added.
    larger = CrossAttention(1, grid=4)
    vision = normal(1, 4, 4, 4)
    ours = apply(module, {"params": params}, vision, language, token_mask)
    params["positions"] = twice(np.asarray(params["positions"]))
    close(ours, apply(larger, {"params": params}, vision, language, token_mask))


@pytest.mark.parametrize("pre_norm", [True, False])
def test_mask_generator_is_decoder_layers_on_learned_queries(pre_norm):
    config = CoupAlignConfig(
        queries=3,
        generator_dim=8,
        heads=2,
        generator_layers=2,
        generator_ffn=6,
        generator_pre_norm=pre_norm,
    )
    module, fused = MaskGenerator(config), normal(2, 2, 3, 5)
    variables = init(module, fused, train=False)
    params = variables["params"]

    def norm(x):  # Scale and bias are still 1 and 0.
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    masks = jnp.stack([params["queries"]] * 2)
    memory = linear(fused, params["memory"]).reshape(2, 6, 8)
    memory = norm(memory) if pre_norm else memory
    positions = (params["queries"], sine_positions(2, 3, 8))
    for name in ("layer0", "layer1"):
        layer = DecoderLayer(8, 2, 6, pre_norm=pre_norm)
        masks = apply(layer, {"params": params[name]}, masks, memory, *positions)
    close(apply(module, variables, fused, train=False), norm(masks) if pre_norm else masks)


def test_pre_norm_layer_adds_to_what_it_does_not_normalise():
    queries, memory = normal(1, 3, 8), normal(1, 4, 8)
    layer = DecoderLayer(8, 2, 6, pre_norm=True)
    variables = init(layer, queries, memory)
    # Blocks that end in 0 leave the queries as they are.
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if path[-2].key in ("out", "Dense_1") else x, variables
    )
    np.testing.assert_array_equal(apply(layer, silent, queries, memory), queries)
    # And each block reads its own normalised input: with one silent, the others still act.
    assert np.abs(apply(layer, variables, queries, memory) - queries).max() > 1e-2
    scaled = apply(layer, variables, 1000 * queries, memory) - 1000 * queries
    assert np.abs(scaled).max() < 100


def conv3x3(x, layer):
    """[h, w, C] with zeros around it."""
    kernel, bias = np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"])
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((h, w, kernel.shape[-1]))
    for row, column in np.ndindex(h, w):
        for i, j in np.ndindex(3, 3):
            out[row, column] += padded[row + i, column + j] @ kernel[i, j]
    return out + bias


def twice(x):
    """Bilinear upsampling by 2, pixel centres at i + 0.5."""
    h, w, C = x.shape
    out = np.zeros((2 * h, 2 * w, C))
    for row, column in np.ndindex(2 * h, 2 * w):
        for i, j in np.ndindex(h, w):
            y = np.clip((row + 0.5) / 2 - 0.5, 0, h - 1)
            z = np.clip((column + 0.5) / 2 - 0.5, 0, w - 1)
            out[row, column] += max(0, 1 - abs(y - i)) * max(0, 1 - abs(z - j)) * x[i, j]
    return out


def test_seg_head_is_eq_10():
    dim = 3
    features = [normal(1, 4, 4, 2), normal(1, 2, 2, 4), normal(1, 2, 2, 5)]
    fused = normal(1, 2, 2, 5)
    module = SegHead(dim)
    variables = randomise(init(module, fused, features, train=False))
    ours = apply(module, variables, fused, features, train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def rho(x, name):
        for i in "12":
            layer, norm = params[name], params[name][f"norm{i}"]
            x = np.maximum(conv3x3(x, layer[f"conv{i}"]), 0)  # Batch norm comes last.
            mean, var = (np.asarray(stats[name][f"norm{i}"][k]) for k in ("mean", "var"))
            x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        return x

    y = rho(fused[0], "rho3") + linear(features[2][0], params["gamma3"])  # As large: no upsampling.
    y = rho(y, "rho2") + linear(features[1][0], params["gamma2"])
    y = twice(rho(y, "rho1")) + linear(features[0][0], params["gamma1"])
    close(ours[0], y)

    chosen = normal(1, dim)
    again, products = apply(module, variables, fused, features, train=False, chosen=chosen)
    close(again, ours)
    close(products[0], y @ chosen[0])


def test_sma_is_eq_11_and_12_and_its_factored_form_equals_the_printed_one():
    """The printed form: pixels and masks projected to D, N proposals, their weighted sum."""
    N, D, d_q, d_s = 5, 6, 4, 3
    masks, sentence, pixels = normal(1, N, d_q), normal(1, D), normal(1, 2, 2, d_s)
    module = SMA(D, d_s, temperature=0.5)
    variables = init(module, masks, sentence)
    params = variables["params"]
    weights, embeddings = apply(module, variables, masks, sentence)
    factored = jnp.einsum("bhwc,bc->bhw", pixels, jnp.einsum("bn,bnc->bc", weights, embeddings))

    W_Y = np.asarray(params["pixels"]["kernel"], np.float64).T  # d_s x D
    projected = [linear(q, params["masks"]) for q in masks[0]]
    cosines = [q @ sentence[0] / np.sqrt((q @ q) * (sentence[0] @ sentence[0])) for q in projected]
    expected = softmax(np.array(cosines) / 0.5)
    close(weights[0], expected)
    for row, column in np.ndindex(2, 2):
        pixel = pixels[0, row, column] @ W_Y
        proposals = [pixel @ q for q in projected]
        close(embeddings[0] @ pixels[0, row, column], proposals)
        close(
            factored[0, row, column], sum(p * m for p, m in zip(expected, proposals, strict=True))
        )


# The whole model.


def tiny(variant="", **changes):
    config = coupalign.get_config(variant).model
    config.swin.update(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    config.resnet.update(width=4, depths=(1, 1, 1, 1))
    config.darknet.update(width=4, depths=(1, 1, 1, 1))
    config.bert.update(hidden=16, layers=4, heads=2, intermediate=16, vocab_size=50)
    config.wpa_stages = config.wpa_stages and (1, 2, 3, 4)
    config.update(joint_dim=8, heads=2, queries=5, generator_dim=8, generator_layers=1)
    config.update(generator_ffn=8, seg_dim=8, **changes)
    return models.build(config)


def inputs(height=64, width=64):
    tokens = jnp.asarray(RNG.integers(1, 50, (2, 6)))
    token_mask = jnp.arange(6) < jnp.array([[6], [4]])
    return jnp.asarray(normal(2, height, width, 3)), tokens, token_mask


@pytest.fixture(scope="module")
def small():
    """The small model, tiny: jitted, with details; its variables; and what goes in."""
    model, arguments = tiny(), inputs(50, 70)
    variables = init(model, *arguments)
    return jax.jit(functools.partial(model.apply, details=True)), variables, arguments


def test_logits_at_a_quarter_for_any_size_and_padding_words_are_not_read(small):
    predict, variables, (image, tokens, token_mask) = small
    outputs = predict(variables, image, tokens, token_mask)
    assert outputs["logits"].shape == (2, 13, 18) and outputs["logits"].dtype == jnp.float32
    assert outputs["pixels"].shape == (2, 13, 18, 8)
    np.testing.assert_allclose(np.median(jax.nn.sigmoid(outputs["logits"])), 0.05, atol=0.03)
    other = jnp.where(token_mask, tokens, 7)
    assert (other != tokens).any()
    close(predict(variables, image, other, token_mask)["logits"], outputs["logits"])
    # And the words that are there are read.
    changed = predict(variables, image, tokens.at[0, 1].add(1), token_mask)["logits"]
    assert np.abs(changed[0] - outputs["logits"][0]).max() > 1e-4
    close(changed[1], outputs["logits"][1])


def test_details_are_what_the_mask_is_made_of(small):
    predict, variables, arguments = small
    outputs = predict(variables, *arguments)
    details = outputs["details"]
    assert details["proposals"].shape == (2, 5, 13, 18)
    close(details["proposal_weights"].sum(1), 1)
    weighted = jnp.einsum("bn,bnhw->bhw", details["proposal_weights"], details["proposals"])
    close(weighted, outputs["logits"])
    shapes = [x.shape for x in details["word_attention"]]
    assert shapes == [(2, 6, 13, 18), (2, 6, 7, 9), (2, 6, 4, 5), (2, 6, 2, 3)]
    for attention in details["word_attention"]:
        close(attention.sum((2, 3)), 1)


@pytest.mark.parametrize(
    "variant, present, absent",
    [
        ("", "swin alignments_0 alignments_3 mask_generator mask_alignment bias", "classifier"),
        ("no_wpa", "swin", "alignments_0 alignments_1 alignments_2 alignments_3"),
        ("uni", "alignments_0", "alignments_0/language_gate alignments_0/language_out"),
        ("no_sma", "classifier", "mask_generator mask_alignment bias"),
        ("no_aux", "mask_generator", ""),
        ("resnet101", "resnet alignments_0/language_gate", "swin darknet"),
        ("darknet53", "darknet", "swin resnet"),
    ],
)
def test_variants_have_their_parts_only(variant, present, absent):
    model, arguments = tiny(variant), inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    flat = traverse_util.flatten_dict(variables["params"])
    paths = {path[0] for path in flat} | {"/".join(path[:2]) for path in flat}
    assert model.pixels == ("darknet" if variant == "darknet53" else "imagenet")
    assert set(present.split()) <= paths and not set(absent.split()) & paths
    outputs, updated = jax.eval_shape(
        functools.partial(model.apply, train=True, mutable=["batch_stats"]), variables, *arguments
    )
    assert jax.tree.map(jnp.shape, updated) == jax.tree.map(
        jnp.shape, {"batch_stats": variables["batch_stats"]}
    )
    mask, valid = np.zeros((2, 64, 64), bool), np.ones(2, bool)
    _, scalars = jax.eval_shape(lambda x: model.loss(x, mask, valid, jax.random.key(0)), outputs)
    assert ("loss_aux" in scalars) == (variant != "no_aux")


def test_every_parameter_is_trained():
    model, (image, tokens, token_mask) = tiny(), inputs()
    variables = init(model, image, tokens, token_mask)
    mask = jnp.zeros((2, 64, 64), bool).at[:, 10:40, 20:50].set(True)

    def loss_fn(params):
        outputs, _ = model.apply(
            {**variables, "params": params},
            image, tokens, token_mask, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return model.loss(outputs, mask, jnp.ones(2, bool), jax.random.key(1))[0]

    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    assert np.isfinite(loss)
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        assert np.isfinite(gradient).all(), path
        # A bias of the keys moves all logits of a softmax alike.
        assert path[-2:] == ("key", "bias") or np.abs(gradient).max() > 0, path


def test_loss_is_eq_13_to_17():
    model = tiny(aux_weight=0.25, aux_temperature=0.2, aux_normalize=False)
    mask = np.zeros((3, 12, 8), bool)
    mask[0, :8, :3], mask[2] = True, True
    outputs = {"logits": jnp.full((3, 3, 2), -1.5), "pixels": jnp.asarray(normal(3, 3, 2, 8))}
    valid = np.array([True, True, False])
    loss, scalars = model.loss(outputs, mask, valid, jax.random.key(0))
    share = mask[:2].mean((1, 2))
    entropy = share * np.log(1 + np.exp(1.5)) + (1 - share) * np.log(1 + np.exp(-1.5))
    close(scalars["loss_segmentation"], entropy.mean())
    labels = np.array([[True, False], [True, False], [False, False]]).ravel()
    contrast = pixel_contrast_loss(outputs["pixels"][:1].reshape(1, 6, 8), labels[None], 0.2, False)
    assert contrast[0] > 0
    close(scalars["loss_aux"], contrast[0] / 2)  # The second image has no foreground.
    close(loss, entropy.mean() + 0.25 * contrast[0] / 2)


# Recipes.


@pytest.mark.parametrize(
    "variant, vision, total",
    [
        ("refcoco", 86_876_536, 248_200_312),
        ("refcoco,swin_small", 48_835_722, 206_319_242),
        ("refcoco,resnet101", 42_500_160, 211_238_720),
        ("refcoco,darknet53", 40_584_928, 201_908_704),
    ],
)
def test_paper_size(variant, vision, total):
    """Shapes and parameter count of the paper's recipe, without computing anything."""
    config = coupalign.get_config(variant)
    config.model.bert.vocab_size = 30522
    assert config.data.image_size == 448 and config.data.max_tokens == 30
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 448, 30))
    outputs = jax.eval_shape(
        functools.partial(model.apply, details=True),
        variables,
        jax.ShapeDtypeStruct((2, 448, 448, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 30), jnp.int32),
        jax.ShapeDtypeStruct((2, 30), jnp.bool_),
    )
    assert outputs["logits"].shape == (2, 112, 112)
    assert outputs["pixels"].shape == (2, 112, 112, 512)
    assert outputs["details"]["proposals"].shape == (2, 100, 112, 112)
    # A ResNet's stages begin with their stride, the others' end before it.
    side = 28 if config.model.backbone == "resnet" else 14
    assert outputs["details"]["word_attention"][3].shape == (2, 30, side, side)
    assign_groups(variables["params"], config.optim.groups)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    params = variables["params"]
    assert (count(params[config.model.backbone]), count(params)) == (vision, total)


def test_rate_falls_to_half_by_epoch_25_of_50():
    config = coupalign.get_config("refcoco")
    assert (config.train.epochs, config.train.batch_size) == (50, 16)
    schedule = make_schedule(config.optim, 5000)
    expected = 1.5e-5 + 1.5e-5 * (1 - 1000 / 2500) ** 0.9
    np.testing.assert_allclose([schedule(0), schedule(1000)], [3e-5, expected], rtol=1e-5)
    np.testing.assert_allclose([schedule(2500), schedule(4999)], 1.5e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "vgg"}, "backbone='vgg'"),
        ({"direction": "both"}, "direction='both'"),
        ({"sentence": "max"}, "sentence='max'"),
        ({"generator_dim": 66}, "generator_dim=66 is not a multiple of 4"),
        ({"wpa_stages": (2, 1)}, "wpa_stages"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(UserError, match=f"config.model.{message}"):
        tiny(**changes)


def test_words_need_as_many_layers_in_each_stage():
    config = coupalign.get_config().model
    config.bert.layers = 7
    with pytest.raises(UserError, match="bert.layers=7 cannot be shared out evenly among 3"):
        models.build(config)
