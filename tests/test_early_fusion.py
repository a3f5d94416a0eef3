"""CrossVLT's variants, the recipes of CrossVLT and LAVT, and their way through a training step."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import crossvlt, lavt
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.losses.segmentation import two_class_loss
from refseg_jax.models.crossvlt import CrossVLTConfig, PrintedFusion, PrintedUpdate
from refseg_jax.models.encoders.bert import MemoryAttention
from refseg_jax.models.lavt import LAVTConfig
from refseg_jax.models.layers.early_fusion import PixelWordAttention
from refseg_jax.models.layers.norms import EPSILON, BatchNorm
from refseg_jax.optim import assign_groups, make_optimizer
from refseg_jax.train import train_step
from refseg_jax.train_state import init_state, init_variables
from refseg_jax.weights.released import crossvlt_from_released
from tests.equations import draw

CONFIGS = {"crossvlt": crossvlt, "lavt": lavt}


def build(config):
    config.model.bert.vocab_size = config.model.bert.vocab_size or 100
    return models.build(config.model)


def abstract_variables(config):
    init = functools.partial(
        init_variables,
        build(config),
        image_size=config.data.image_size,
        max_tokens=config.data.max_tokens,
    )
    return jax.eval_shape(init, jax.random.key(0))


def paths(config) -> set[str]:
    """Names of the modules at the top, and of those one below in the language stages."""
    flat = traverse_util.flatten_dict(abstract_variables(config)["params"])
    return {path[0] for path in flat} | {"/".join(path[:2]) for path in flat if len(path) > 2}


@pytest.mark.parametrize(
    "name, variant",
    [
        ("crossvlt", v)
        for v in ("", "refcoco", "refcoco+,paper", "refcocog_umd,small", "refcoco,uni")
    ]
    + [("crossvlt", v) for v in ("refcoco,aux", "refcoco,no_align", "refcoco,swin_small")]
    + [("crossvlt", v) for v in ("refcoco,paper,aux", "refcoco,paper,no_align")]
    + [("crossvlt", v) for v in ("resnet101", "refcoco,resnet101", "refcoco,paper,resnet101")]
    + [("lavt", v) for v in ("", "refcoco", "refcoco,small", "refcoco,swin_small")],
)
def test_every_recipe_builds_and_its_groups_fit(name, variant):
    config = CONFIGS[name].get_config(variant)
    params = abstract_variables(config)["params"]
    assign_groups(params, config.optim.groups)


def test_words_and_the_stages_of_a_resnet_attend_to_each_other():
    config = crossvlt.get_config("resnet101")
    model, rng = build(config), np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, 90, 64, 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(1, 100, (2, 6)))
    token_mask = np.arange(6) < np.array([[6], [4]])
    mask = rng.random((2, 90, 64)) < 0.3
    variables = draw(model, image, tokens, token_mask)
    assert "swin" not in variables["params"]

    @jax.jit
    def run(params):
        outputs, updated = model.apply(
            {**variables, "params": params}, image, tokens, token_mask, train=True,
            rngs={"dropout": jax.random.key(1)}, mutable="batch_stats",
        )  # fmt: skip
        return model.loss(outputs, mask, np.ones(2, bool), jax.random.key(2))[0], (outputs, updated)

    grads, (outputs, updated) = jax.grad(run, has_aux=True)(variables["params"])
    assert outputs["logits"].shape == mask.shape
    assert [x.shape for x in outputs["stage_logits"]] == [
        (2, 23, 16), (2, 12, 8), (2, 6, 4), (2, 3, 2),
    ]  # fmt: skip
    norms = jax.tree.map(lambda x: float(jnp.linalg.norm(x)), grads)
    for name in ("resnet", "fusions_0", "merged_fusions_2", "language_stages_2", "alignments_3"):
        assert max(jax.tree.leaves(norms[name])) > 0
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), variables["batch_stats"], updated["batch_stats"]
    )
    assert all(jax.tree.leaves(moved["resnet"]))


def test_paper_and_released_recipes_differ_where_they_should():
    released, paper = (crossvlt.get_config(v) for v in ("refcoco", "refcoco,paper"))
    assert (released.optim.lr, paper.optim.lr) == (3e-5, 3e-4)
    assert (released.model.class_weights, paper.model.class_weights) == ((0.9, 1.1), (1.0, 1.0))
    assert released.data.sampling == "ref" and released.data.max_tokens == 21
    frozen = [
        dict((pattern, rate) for pattern, rate, _ in c.optim.groups) for c in (released, paper)
    ]
    assert "^temperature$" not in frozen[0] and frozen[1]["^temperature$"] == 1


def test_equations_as_printed():
    """Eq. 1-4, in a loop over samples, pixels and heads."""
    B, n, C, T, D, heads = 2, 5, 12, 4, 6, 3
    rng = np.random.default_rng(0)
    vision, language = rng.normal(size=(B, n, C)), rng.normal(size=(B, T, D))
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    fusion, update = PrintedFusion(C, heads), PrintedUpdate()
    arrays = jnp.asarray(vision, jnp.float32), jnp.asarray(language, jnp.float32), mask
    M_hat, params = fusion.init_with_output(jax.random.key(0), *arrays)
    M, ffn = update.init_with_output(jax.random.key(1), arrays[0], M_hat)

    def linear(layer, x):
        return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])

    p = params["params"]["attention"]
    first, second = (ffn["params"]["ffn"][f"Dense_{i}"] for i in (0, 1))
    for b in range(B):
        words = language[b, mask[b]]
        for i in range(n):
            query = linear(p["query"], vision[b, i])
            keys, values = linear(p["key"], words), linear(p["value"], words)
            gathered = []
            for part in np.split(np.arange(C), heads):
                weights = np.exp(keys[:, part] @ query[part] / np.sqrt(C // heads))
                gathered.append(weights / weights.sum() @ values[:, part])
            expected = linear(p["out"], np.concatenate(gathered)) + vision[b, i]
            np.testing.assert_allclose(M_hat[b, i], expected, rtol=1e-4, atol=1e-5)
            hidden = linear(first, expected)
            hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2)))
            expected = linear(second, hidden) + vision[b, i]
            np.testing.assert_allclose(M[b, i], expected, rtol=1e-4, atol=1e-5)


def test_the_printed_form_replaces_the_released_one():
    released, paper = (crossvlt.get_config(v) for v in ("refcoco", "refcoco,paper"))
    released, paper = (
        traverse_util.flatten_dict(abstract_variables(config)["params"], sep="/")
        for config in (released, paper)
    )
    assert {"fusions_0/mix/kernel", "gates_3/fc1/kernel"} <= released.keys()
    parts = (path.split("/") for path in paper)
    names = {part[1] for part in parts if part[0].startswith(("fusions", "gates", "merged"))}
    assert names == {"attention", "ffn"}
    query = "fusions_0/attention/query/kernel"
    assert (released[query].shape, paper[query].shape) == ((128, 256), (128, 128))


def test_variants_have_their_parts_only():
    full = paths(crossvlt.get_config())
    assert {"fusions_0", "merged_fusions_0", "language_stages_0/fusion", "temperature"} <= full
    uni = paths(crossvlt.get_config("uni"))
    assert {"fusions_0", "language_stages_0/blocks_0"} <= uni
    assert "language_stages_0/fusion" not in uni
    late = crossvlt.get_config("no_align")
    late.model.fusion_stages = (4,)
    late = paths(late)
    assert {"fusions_3", "language_stages_2/fusion", "language_stages_0/blocks_0"} <= late
    assert not late & {"fusions_2", "merged_fusions_2", "gates_2", "language_stages_1/fusion"}
    assert not late & {"alignments_0", "temperature"}
    aux = paths(crossvlt.get_config("aux"))
    assert "aux_heads_3" in aux and not aux & {"alignments_3", "temperature"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("backbone", "vgg"),
        ("direction", "both"),
        ("fusion_stages", (0, 1)),
        ("align_stages", (3, 2)),
        ("language_depths", (2, 0, 2)),
        ("language_depths", (2, 2)),
        ("fusion_form", "printed"),
        ("draws", "torch"),
        ("head_dim", 0),
        ("head_dim", 48),
        ("align_dim", 0),
        ("class_weights", (1.0,)),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(UserError, match=f"config.model.{field}"):
        CrossVLTConfig(**{field: value})


def test_unknown_draws_are_named():
    with pytest.raises(UserError, match="config.model.draws='torch' is not one of released, flax"):
        LAVTConfig(draws="torch")


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 1.0, 5.0), (0.0, 0.0), (-1.0, 2.0), (np.nan, 1.0), (np.inf, 1.0)]
)
def test_class_weights_are_two(weights):
    with pytest.raises(UserError, match="config.model.class_weights=.* are not two"):
        LAVTConfig(class_weights=weights)
    LAVTConfig(class_weights=(0.0, 1.0))


@pytest.mark.parametrize("name", ["crossvlt", "lavt"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_carries_the_running_statistics(name, accumulate):
    """Shapes only: the state that comes out fits where it came from."""
    config = CONFIGS[name].get_config()
    model = build(config)
    variables = abstract_variables(config)
    tx, _ = make_optimizer(config.optim, variables["params"], 1000)
    state = jax.eval_shape(
        lambda variables, key: init_state(variables, lambda _: tx, key, False),
        variables,
        jax.random.key(0),
    )
    B, H, T = 4, config.data.image_size, config.data.max_tokens
    batch = dict(
        image=jax.ShapeDtypeStruct((B, H, H, 3), jnp.uint8),
        mask=jax.ShapeDtypeStruct((B, H, H), jnp.bool_),
        tokens=jax.ShapeDtypeStruct((B, T), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((B, T), jnp.bool_),
        valid=jax.ShapeDtypeStruct((B,), jnp.bool_),
    )
    step = functools.partial(train_step, model=model, tx=tx, accumulate=accumulate)
    after, scalars = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.leaves(state.model_state["batch_stats"])
    assert "loss_task" in scalars


@pytest.mark.parametrize("align_at", ["input", "stage"])
def test_loss_of_logits_that_know_nothing(align_at):
    config = crossvlt.get_config()
    config.model.align_at = align_at
    mask = np.random.default_rng(0).random((2, 50, 70)) < 0.3
    outputs = {
        "logits": jnp.zeros(mask.shape),
        # Of 50 x 70 pixels.
        "stage_logits": [jnp.zeros((2, h, w)) for h, w in ((13, 18), (7, 9), (4, 5), (2, 3))],
    }
    loss, scalars = build(config).loss(outputs, mask, np.array([True, False]), jax.random.key(0))
    np.testing.assert_allclose(loss, (2 + 4) * np.log(2), rtol=1e-6)
    config.model.update(task_weight=3.0, align_weight=0.5)
    weighted, _ = build(config).loss(outputs, mask, np.array([True, False]), jax.random.key(0))
    np.testing.assert_allclose(weighted, (3 + 0.5 * 4) * np.log(2), rtol=1e-6)
    assert set(scalars) == {"loss_task", *(f"loss_align{i}" for i in (1, 2, 3, 4))}


HE, PYTORCH = (lambda fan_in, n=n: (n / fan_in) ** 0.5 for n in (2, 1 / 3))


@pytest.mark.parametrize(
    "name, draws, groups",
    [
        # What LAVT's code says of convolutions, which these all are: nothing.
        ("lavt", "released", {"(fusions|decoder)": PYTORCH}),
        (
            "crossvlt",
            "released",
            {
                r"(merged_)?fusions_\d/(mix|attention/(query|out))/": HE,
                r"(merged_)?fusions_\d/attention/(key|value)/": lambda fan_in: 0.02,
                "(alignments|language_stages)": lambda fan_in: 0.02,
                "decoder": PYTORCH,
            },
        ),
        ("lavt", "flax", {"(fusions|decoder)": lambda fan_in: fan_in**-0.5}),
        ("crossvlt", "flax", {"(.*fusions|alignments|decoder)": lambda fan_in: fan_in**-0.5}),
    ],
)
def test_new_layers_start_as_they_should(name, draws, groups):
    config = CONFIGS[name].get_config()
    config.model.update(draws=draws, shut_gates=True)
    init = functools.partial(init_variables, build(config), image_size=40, max_tokens=4)
    params = traverse_util.flatten_dict(jax.jit(init)(jax.random.key(0))["params"], sep="/")
    groups = groups | {"(merged_)?gates": lambda fan_in: 0.02}
    for pattern, deviation in groups.items():
        kernels = {path: x for path, x in params.items() if re.match(pattern, path) and x.ndim > 1}
        assert kernels
        for path, x in kernels.items():
            expected = deviation(math.prod(x.shape[:-1]))
            # Four times what the deviation of so many numbers deviates by.
            np.testing.assert_allclose(
                x.std(), expected, rtol=4 / (2 * x.size) ** 0.5, err_msg=path
            )
            if deviation is PYTORCH:
                assert np.abs(x).max() <= 3**0.5 * expected


def test_pixels_ask_words_as_defined():
    """Normalised queries, keys and values split into heads, a linear layer and a norm."""
    rng = np.random.default_rng(0)
    B, S, C, T, D, dim, heads = 3, 20, 6, 7, 9, 8, 2
    vision = jnp.asarray(rng.normal(1, 2, (B, S, C)))
    language = jnp.asarray(rng.normal(size=(B, T, D)))
    token_mask = np.arange(T) < np.array([[7], [4], [2]])
    module = PixelWordAttention(dim, heads, scale=0.7)
    params = draw(module, vision, language, token_mask)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)

    def defined(params, vision):
        def linear(x, name):
            return x @ params[name]["kernel"] + params[name]["bias"]

        def normal(x):
            return (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + EPSILON)

        def split(x):
            return x.reshape(B, -1, heads, dim // heads)

        q = split(normal(linear(vision, "query")))
        k, v = split(linear(language, "key")), split(linear(language, "value"))
        logits = 0.7 * jnp.einsum("bnhd,bthd->bhnt", q, k)
        logits = jnp.where(token_mask[:, None, None], logits, -1e30)
        y = jnp.einsum("bhnt,bthd->bnhd", jax.nn.softmax(logits), v).reshape(B, S, dim)
        return normal(linear(y, "out"))

    cotangent = rng.normal(size=vision.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def results(function):
        y, pull_back = jax.vjp(function, params, vision)
        return y, *pull_back(cotangent)

    def ours(params, vision, dtype=jnp.float32):
        return module.clone(dtype=dtype).apply({"params": params}, vision, language, token_mask)

    expected = results(defined)
    close = ours(params, vision, jnp.bfloat16).astype(jnp.float32)
    assert np.sqrt(np.mean((close - expected[0]) ** 2)) < 0.02  # Eight bits of standard numbers.
    for a, b in zip(results(ours), expected, strict=True):
        # Biases of keys, and before a norm, have the gradient 0: the others are the measure of it.
        largest = max(np.abs(x).max() for x in jax.tree.leaves(b))
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4 * largest)
        jax.tree.map(close, a, b)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_tokens_ask_a_memory_as_defined(rate):
    rng = np.random.default_rng(0)
    q, memory = rng.normal(size=(2, 3, 4, 8)), rng.normal(size=(2, 10, 6))
    kept = rng.random((2, 4, 3, 10)) >= rate
    params = {"kernel": rng.normal(size=(6, 64)), "bias": rng.normal(size=64)}

    class Dropout:
        deterministic = False

        def __call__(self, weights):
            return weights * kept / (1 - rate)

    dropout = Dropout()
    dropout.rate = rate
    ours = MemoryAttention().apply({"params": params}, q, memory, dropout)
    k, v = np.moveaxis((memory @ params["kernel"] + params["bias"]).reshape(2, 10, 2, 4, 8), 2, 0)
    weights = dropout(jax.nn.softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)))
    theirs = np.einsum("bhqk,bkhd->bqhd", weights, v)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_two_class_loss_weighs_the_pixels_of_the_whole_batch():
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 4, 5)), rng.random((3, 4, 5)) < 0.4
    valid = np.array([True, True, False])
    weight = np.where(mask, 1.1, 0.9)[valid]
    entropy = np.log1p(np.exp(np.where(mask, -logits, logits)))[valid]
    ours = two_class_loss(jnp.asarray(logits), mask, valid, (0.9, 1.1))
    np.testing.assert_allclose(ours, (weight * entropy).sum() / weight.sum(), rtol=1e-6)


def test_batch_norm_learns_the_unbiased_variance():
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 1, 5)).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    y, updated = norm.apply(variables, x, train=True, mutable="batch_stats")
    np.testing.assert_allclose(y.reshape(-1, 5).std(0), 1, rtol=1e-4)
    flat = x.reshape(-1, 5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_a_checkpoint_of_another_model_is_one_short_error():
    state = {f"backbone.layers.0.blocks.{i}.norm1.weight": np.zeros(3) for i in range(99)}
    with pytest.raises(UserError, match="not a released CrossVLT checkpoint") as error:
        crossvlt_from_released(state, CrossVLTConfig())
    assert len(str(error.value)) < 2000
