"""AlignFormer: its equations as slow loops, its variants, and its size in the paper's recipe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import alignformer
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.models.alignformer import VLBA
from refseg_jax.train_state import init_variables
from tests import tiny
from tests.equations import apply, draw, init

RNG = np.random.default_rng(0)


def build(variant="", **changes):
    config = tiny.config(variant, model__bert__dropout=0.0, **changes)
    config.model.bert.vocab_size = 50
    return models.build(config.model)


def inputs(height=64, width=64):
    tokens = jnp.asarray(RNG.integers(1, 50, (2, 6)))
    token_mask = jnp.arange(6) < jnp.array([[6], [4]])
    return jnp.asarray(RNG.normal(size=(2, height, width, 3)), jnp.float32), tokens, token_mask


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("update_language", [True, False])
def test_vlba_is_eq_1_to_7(update_language):
    S, T, C, D = 5, 4, 6, 8
    vision, language = RNG.normal(size=(1, S, C)), RNG.normal(size=(1, T, D))
    token_mask = np.array([[True, True, True, False]])
    module = VLBA(fuse_hidden=2.0, update_language=update_language)
    params = module.init(jax.random.key(0), vision, language, token_mask)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * RNG.normal(size=x.shape).astype(x.dtype), params)
    ours = module.apply({"params": params}, vision, language, token_mask)

    def linear(x, *path):
        layer = params
        for name in path:
            layer = layer[name]
        return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])

    def gelu(x):
        return 0.5 * x * (1 + np.asarray(jax.scipy.special.erf(x / np.sqrt(2))))

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    def fused(x, response, name):
        hidden = gelu(linear(np.concatenate([x, response]), name, "fuse", "Dense_0"))
        m = linear(hidden, name, "fuse", "Dense_1")
        gate = np.maximum(linear(m, name, "gate", "Dense_0"), 0)
        return x + m * np.tanh(linear(gate, name, "gate", "Dense_1"))

    v, words = vision[0], language[0]
    key, value = linear(words, "language_key"), linear(words, "language_value")
    scores = np.array([[linear(v[s], "vision_query") @ key[t] for t in range(T)] for s in range(S)])
    scores /= np.sqrt(C)
    real = np.flatnonzero(token_mask[0])
    for s in range(S):
        seen = softmax(scores[s, real]) @ value[real]
        np.testing.assert_allclose(
            ours[0][0, s], fused(v[s], linear(seen, "w1"), "vision_fusion"), rtol=1e-4, atol=1e-5
        )
    if not update_language:
        np.testing.assert_array_equal(ours[1], language)
        return
    for t in range(T):
        seen = softmax(scores[:, t]) @ linear(v, "vision_value")
        np.testing.assert_allclose(
            ours[1][0, t], fused(words[t], linear(seen, "w2"), "language_fusion"),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_logits_at_a_quarter_for_any_size_and_padding_words_are_not_read():
    model = build()
    image, tokens, token_mask = inputs(50, 70)
    variables = init(model, image, tokens, token_mask)
    outputs = apply(model, variables, image, tokens, token_mask)
    assert outputs["logits"].shape == (2, 13, 18) and outputs["logits"].dtype == jnp.float32
    assert outputs["pixel_embedding"].shape == (2, 13, 18, 16)
    assert model.config.prior == 0.05
    np.testing.assert_allclose(np.median(jax.nn.sigmoid(outputs["logits"])), 0.05, atol=0.03)
    other = jnp.where(token_mask, tokens, 7)
    assert (other != tokens).any()
    np.testing.assert_allclose(
        apply(model, variables, image, other, token_mask)["logits"], outputs["logits"], atol=1e-5
    )
    # And the words that are there are read.
    changed = apply(model, variables, image, tokens.at[0, 1].add(1), token_mask)["logits"]
    assert np.abs(changed[0] - outputs["logits"][0]).max() > 1e-4
    np.testing.assert_allclose(changed[1], outputs["logits"][1], atol=1e-5)


def test_a_tpu_computes_the_same(like_a_tpu):
    model, arguments = build(), inputs(50, 70)
    variables = draw(model, *arguments)

    def loss(params):
        return jnp.mean(model.apply(variables | {"params": params}, *arguments)["logits"] ** 2)

    def value_and_gradients():
        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    elsewhere = value_and_gradients()
    like_a_tpu()
    value, gradients = value_and_gradients()
    assert float(value) == pytest.approx(float(elsewhere[0]), rel=1e-4)
    for path, ours in jax.tree.leaves_with_path(gradients):
        theirs = functools.reduce(lambda tree, key: tree[key.key], path, elsewhere[1])
        assert jnp.abs(ours - theirs).max() <= 1e-4 * jnp.abs(theirs).max() + 1e-5, path


@pytest.mark.parametrize("lateral", [False, True])
def test_logits_are_products_of_the_embeddings_as_printed(lateral):
    """With `prior` off the mask is L_e . V_e: linear in V_e, no bias."""
    config = alignformer.get_config("refcoco").model
    assert config.prior == 0 and not config.lateral and not config.swin.positions
    model = build(model__prior=0.0, model__lateral=lateral)
    image, tokens, token_mask = inputs(50, 70)
    variables = draw(model, image, tokens, token_mask)
    outputs = apply(model, variables, image, tokens, token_mask)
    pixels = np.asarray(outputs["pixel_embedding"][0].reshape(-1, 16), np.float64)
    logits = np.asarray(outputs["logits"][0]).ravel()
    centre, *_ = np.linalg.lstsq(pixels, logits, rcond=None)
    np.testing.assert_allclose(pixels @ centre, logits, atol=1e-4)
    if lateral:  # It is read.
        decoder = variables["params"]["pixel_decoder"]
        decoder["lateral"] = jax.tree.map(lambda x: -x, decoder["lateral"])
        other = apply(model, variables, image, tokens, token_mask)["pixel_embedding"]
        assert np.abs(other - outputs["pixel_embedding"]).max() > 0.1


@pytest.mark.parametrize(
    "variant, gone",
    [
        ("no_fusion", "fusions_0"),
        ("per_pixel", "centre_decoder"),
        ("vlua", None),
        ("no_cmic", None),
    ],
)
def test_variants_of_tables_2_to_4(variant, gone):
    model = build(variant)
    image, tokens, token_mask = inputs()
    variables = draw(model, image, tokens, token_mask)
    params = variables["params"]
    assert gone is None or gone not in params
    assert ("language_fusion" in params.get("fusions_0", {})) == (
        variant not in ("vlua", "no_fusion")
    )
    outputs = apply(model, variables, image, tokens, token_mask, train=True)
    mask = jnp.zeros((2, 64, 64), bool).at[:, 10:40, 20:50].set(True)
    loss, scalars = model.loss(outputs, mask, jnp.ones(2, bool), jax.random.key(1))
    assert np.isfinite(loss) and loss > 0
    assert ("loss_cmic" in scalars) == (variant in ("vlua", "no_fusion"))


def test_invalid_rows_do_not_count():
    model = build()
    image, tokens, token_mask = inputs()
    variables = draw(model, image, tokens, token_mask)
    outputs = apply(model, variables, image, tokens, token_mask)
    mask = jnp.zeros((2, 64, 64), bool).at[0, 10:40, 20:50].set(True)
    valid = jnp.array([True, False])
    loss, _ = model.loss(outputs, mask, valid, jax.random.key(1))
    same, _ = model.loss(outputs, mask.at[1].set(True), valid, jax.random.key(1))
    assert loss == same


@pytest.mark.parametrize("variant, parameters", [("", 237_687_224), ("swin_small", 193_547_242)])
def test_paper_size(variant, parameters):
    """Shapes and parameter count of the paper's recipe, without computing anything."""
    config = alignformer.get_config(f"refcoco,{variant}")
    config.model.bert.vocab_size = 30522
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 480, 20))
    outputs = jax.eval_shape(
        model.apply,
        variables,
        jax.ShapeDtypeStruct((2, 480, 480, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 20), jnp.int32),
        jax.ShapeDtypeStruct((2, 20), jnp.bool_),
    )
    assert outputs["logits"].shape == (2, 120, 120)
    assert count(variables) == parameters
    assert count(variables["params"]["swin"]) == {"": 86_876_536, "swin_small": 48_835_722}[variant]


def test_fields_that_do_not_fit_are_errors():
    with pytest.raises(UserError, match="fusion='both'"):
        build(model__fusion="both")
    for field in ("fuse_hidden", "gate_hidden"):
        with pytest.raises(UserError, match=f"{field}=0.001 leaves no hidden channel"):
            build(**{f"model__{field}": 0.001})
    with pytest.raises(UserError, match="cmic_weight=0"):
        build(model__grouping=False, model__cmic_weight=0.5)
    with pytest.raises(UserError, match="config.model.swin has no field depth"):
        config = tiny.config()
        config.model.swin = {"depth": 3}
        models.build(config.model)
