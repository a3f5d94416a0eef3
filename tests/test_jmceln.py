"""JMCELN: its equations as slow loops, its variants, and its size in the paper's recipe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from configs import jmceln
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.models.jmceln import (
    LSRAN,
    PAN,
    Classifier,
    JMCELNConfig,
    Neck,
    Stage,
    Upsampling,
)
from refseg_jax.models.layers.norms import SwitchNorm
from refseg_jax.models.layers.resize import resize_bilinear
from refseg_jax.sharding import make_mesh
from refseg_jax.train_state import init_variables
from tests.equations import RNG, apply, close, draw, init, linear, normal, randomise, softmax


def conv(x, layer, dilation=1):
    """The convolution of a map [h, w, C] by a kernel [k, k, C, D], cell by cell."""
    kernel = np.asarray(layer["kernel"], np.float64)
    (h, w, _), size = x.shape, len(kernel)
    y = np.zeros((h, w, kernel.shape[-1])) + np.asarray(layer.get("bias", 0.0))
    for row, column, i, j in np.ndindex(h, w, size, size):
        r, c = (at + dilation * (k - size // 2) for at, k in ((row, i), (column, j)))
        if 0 <= r < h and 0 <= c < w:
            y[row, column] += x[r, c] @ kernel[i, j]
    return y


def normed(x, layer, statistics):
    """Batch norm by the running statistics."""
    deviation = np.sqrt(np.asarray(statistics["var"], np.float64) + 1e-5)
    return (x - statistics["mean"]) / deviation * layer["scale"] + layer["bias"]


def conv_norm(x, variables, name, dilation=1):
    params, statistics = (variables[kind][name] for kind in ("params", "batch_stats"))
    return normed(conv(x, params["conv"], dilation), params["norm"], statistics["norm"])


def leaky(x):
    return np.where(x > 0, x, 0.01 * x)


def attention(queries, keys, values, params, heads):
    """Multi-head attention, query by query and head by head."""

    def split(x, name):
        return linear(x, params[name]).reshape(len(x), heads, -1)

    q, k, v = split(queries, "query"), split(keys, "key"), split(values, "value")
    rows = []
    for one in q:
        seen = []
        for head in range(heads):
            scores = np.array([one[head] @ key[head] for key in k]) / np.sqrt(q.shape[-1])
            seen.append(sum(p * x[head] for p, x in zip(softmax(scores), v, strict=True)))
        rows.append(linear(np.concatenate(seen), params["out"]))
    return np.array(rows)


# Equations.


def test_neck_is_eq_1_and_2():
    features = [normal(1, 8, 6, 3), normal(1, 4, 3, 5), normal(1, 2, 2, 7)]
    sentence = normal(1, 6)
    module = Neck(4)
    variables = draw(module, features, sentence, train=False)
    ours = apply(module, variables, features, sentence, train=False)

    def sigma(x, name):
        return leaky(conv_norm(x, variables, name))

    fused = sigma(sentence[:, None], "sentence") * sigma(features[2][0], "vision3")
    for i in (2, 1):
        size = features[i - 1].shape[1:3]
        up = np.asarray(resize_bilinear(jnp.asarray(fused[None], jnp.float32), size)[0])
        fused = np.concatenate([up, sigma(features[i - 1][0], f"vision{i}")], -1)
        fused = sigma(fused, f"join{i}")
    close(ours[0], fused)


def test_lsran_attends_in_windows_and_relates_at_several_distances():
    h, w, C, win, heads = 3, 4, 8, 2, 2
    fused = normal(1, h, w, C)
    config = JMCELNConfig(dim=C, heads=heads, window=win, dilations=(1, 2))
    module = LSRAN(config)
    variables = draw(module, fused, train=False)
    params = variables["params"]
    ours = apply(module, variables, fused, train=False)

    y = fused[0] - fused[0].mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    y = np.concatenate([y, np.zeros((1, w, C))])  # A fourth row fills the windows.
    attended = np.zeros((4, 4, C))
    table = params["attention"]["bias_table"]
    for top, left in ((0, 0), (0, 2), (2, 0), (2, 2)):
        cells = [(top + i, left + j) for i in range(win) for j in range(win)]
        qkv = [linear(y[cell], params["attention"]["qkv"]).reshape(3, heads, -1) for cell in cells]
        for a, (i, j) in enumerate(cells):
            seen = []
            for n in range(heads):
                scores = [
                    qkv[a][0][n] @ qkv[b][1][n] / np.sqrt(C // heads)
                    + table[(i - p + win - 1) * (2 * win - 1) + (j - q + win - 1), n]
                    for b, (p, q) in enumerate(cells)
                ]
                weights = softmax(np.array(scores))
                seen.append(sum(x * qkv[b][2][n] for b, x in enumerate(weights)))
            attended[i, j] = linear(np.concatenate(seen), params["attention"]["proj"])
    y = fused[0] + attended[:h]
    relations = [
        np.maximum(conv_norm(y, variables, f"relation{i}", i), 0) for i in config.dilations
    ]
    assert [x.shape[-1] for x in relations] == [C // 2] * 2
    mixed = linear(np.concatenate(relations, -1), params["mix"])
    close(ours[0], mixed * conv(fused[0], params["boundary"]))


def test_pan_filters_by_the_map_before():
    C, before, after = 8, normal(1, 3, 4, 8), normal(1, 3, 4, 8)
    module = PAN(C)
    variables = draw(module, before, after, train=False)
    params = variables["params"]
    ours = apply(module, variables, before, after, train=False)

    y = linear(after[0], params["after"])
    assert y.shape[-1] == C // 4 + C // 2 + C
    depthwise = params["depthwise"]
    y = np.stack(
        [
            conv(y[..., c, None], {"kernel": depthwise["kernel"][..., c, None]})[..., 0]
            for c in range(y.shape[-1])
        ],
        -1,
    )
    y += depthwise["bias"]
    first, second, third = y[..., :2], y[..., 2:6], y[..., 6:]
    y = linear(before[0], params["before"]) * first
    y = conv(y, params["filter2"]) * second
    y = conv(y, params["filter3"]) * third
    y = linear(y, params["out"])
    norm = SwitchNorm()
    mine = {kind: tree["norm"] for kind, tree in variables.items()}
    y = apply(norm, mine, jnp.asarray(y[None], jnp.float32), train=False)[0]
    close(ours[0], before[0] + y)


@pytest.mark.parametrize("pan", [True, False])
def test_stage_is_eq_3_and_4(pan):
    config = JMCELNConfig(dim=8, heads=2, queries=3, pan=pan)
    queries, fused, source, mask = normal(1, 3, 8), *(normal(1, 2, 3, 8) for _ in range(3))
    module = Stage(config)
    variables = draw(module, queries, fused, source, mask, train=False)
    params = variables["params"]
    asked, ours = apply(module, variables, queries, fused, source, mask, train=False)

    def flat(x):
        return x.reshape(-1, 8)

    # The keys are F_m's, the values those of what is gathered from.
    updated = queries[0] + attention(queries[0], flat(fused), flat(source), params["embedding"], 2)
    close(asked[0], updated)
    after = flat(mask) + attention(flat(mask), updated, updated, params["mask"], 2)
    after = after.reshape(1, 2, 3, 8).astype(np.float32)
    assert ("pan" in params) == pan
    if pan:
        mine = {kind: tree["pan"] for kind, tree in variables.items()}
        after = apply(PAN(8), mine, mask, after, train=False)
    close(ours, after)


def test_upsampling_doubles_convolves_and_classifies():
    x = normal(1, 3, 4, 8)
    module = Upsampling(2)
    variables = draw(module, x, size=(24, 48), train=False)
    params = variables["params"]
    y = x
    for i, size in enumerate([(6, 8), (12, 16)]):
        y = np.asarray(resize_bilinear(jnp.asarray(y, jnp.float32), size))[0]
        y = conv(y, {"kernel": params[f"kernel{i}"]})
        statistics = variables["batch_stats"][f"norm{i}"]
        y = np.maximum(normed(y, params[f"norm{i}"], statistics), 0)[None]
    background, foreground = np.moveaxis(linear(y, params["classifier"]), -1, 0)
    expected = resize_bilinear(jnp.asarray(foreground - background, jnp.float32), (24, 48))
    close(apply(module, variables, x, size=(24, 48), train=False), expected)


# SwitchNorm.


def switch_norm(x, params, batch):
    """Value by value; `batch` gives a channel's mean and variance over the batch."""
    y = np.zeros(x.shape)
    for b, c in np.ndindex(x.shape[0], x.shape[-1]):
        sources = [(p.mean(), p.var()) for p in (x[b, ..., c], x[b])] + [batch(c)]
        mean, var = (
            softmax(np.asarray(params[name], np.float64)) @ [source[k] for source in sources]
            for k, name in enumerate(("mean_mixture", "var_mixture"))
        )
        y[b, ..., c] = (x[b, ..., c] - mean) / np.sqrt(var + 1e-5)
    return y * params["scale"] + params["bias"]


def test_switch_norm_mixes_mean_and_variance_apart():
    x = 3 + 2 * normal(4, 3, 5, 6)
    module = SwitchNorm()
    variables = init(module, x, train=False)
    # Statistics start at 0 and 1, mixtures even.
    assert {k: v.tolist() for k, v in variables["batch_stats"].items()} == {
        "mean": [0] * 6, "var": [1] * 6,
    }  # fmt: skip
    variables = randomise(variables)
    params, statistics = variables["params"], variables["batch_stats"]
    assert params["mean_mixture"].shape == params["var_mixture"].shape == (3,)
    ours, updated = apply(module, variables, x, train=True, mutable=["batch_stats"])
    close(ours, switch_norm(x, params, lambda c: (x[..., c].mean(), x[..., c].var())))
    for name, of_batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        expected = 0.9 * statistics[name] + 0.1 * of_batch
        close(updated["batch_stats"][name], expected)
    evaluated = apply(module, variables, x, train=False)
    running = switch_norm(x, params, lambda c: (statistics["mean"][c], statistics["var"][c]))
    close(evaluated, running)


def test_switch_norm_of_a_sharded_batch_has_the_whole_batch_s_statistics():
    x = normal(8, 3, 3, 4) + np.arange(8).reshape(8, 1, 1, 1)
    module = SwitchNorm()
    variables = draw(module, x, train=False)
    function = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    whole = jax.jit(function)(variables, x)
    rows = NamedSharding(make_mesh(8, 1), PartitionSpec("data"))
    sharded = jax.jit(function, out_shardings=(rows, None))(variables, jax.device_put(x, rows))
    assert len(sharded[0].sharding.device_set) == 8
    jax.tree.map(close, sharded, whole)


# The whole model.


def tiny(variant="", **changes):
    config = jmceln.get_config(variant).model
    config.vision.update(width=4, depths=(1, 1, 1, 1), embed_dim=8)
    config.text.update(hidden=16, layers=1, heads=2, embed_dim=8, vocab_size=50)
    config.update(levels=3, dim=16, heads=2, window=3, stages=2, queries=3, doublings=3)
    config.update(changes)
    return models.build(config)


def inputs(height=64, width=64):
    tokens = jnp.asarray(RNG.integers(1, 50, (2, 6)))
    token_mask = jnp.arange(6) < jnp.array([[6], [4]])
    return jnp.asarray(normal(2, height, width, 3)), tokens, token_mask


def test_training_from_scratch_starts_at_the_prior():
    logits = Classifier(0.05).init_with_output(jax.random.key(0), normal(2, 5, 5, 16))[0]
    np.testing.assert_allclose(np.median(jax.nn.sigmoid(logits)), 0.05, atol=0.01)


def test_stages_masks_any_size_and_padding_words():
    model, (image, tokens, token_mask) = tiny(), inputs(64, 96)
    variables = draw(model, image, tokens, token_mask)
    predict = jax.jit(functools.partial(model.apply, details=True))
    outputs = predict(variables, image, tokens, token_mask)
    assert outputs["logits"].shape == (2, 64, 96) and outputs["logits"].dtype == jnp.float32
    first, last = outputs["details"]["stage_logits"]
    np.testing.assert_array_equal(last, outputs["logits"])
    # The first is what a cascade of one stage gives.
    shorter = {
        kind: {name: part for name, part in tree.items() if name != "stages_1"}
        for kind, tree in variables.items()
    }
    alone = jax.jit(tiny(stages=1).apply)(shorter, image, tokens, token_mask)["logits"]
    close(first, alone)
    assert np.abs(first - last).max() > 1e-3

    other = jnp.where(token_mask, tokens, 7)
    close(predict(variables, image, other, token_mask)["logits"], outputs["logits"])
    changed = predict(variables, image, tokens.at[0, 1].add(1), token_mask)["logits"]
    assert np.abs(changed[0] - outputs["logits"][0]).max() > 1e-4
    close(changed[1], outputs["logits"][1])


def test_embeddings_that_are_not_adaptive_gather_from_the_first_map():
    arguments = inputs()
    variables = draw(tiny(), *arguments)
    adaptive, fixed = (
        jax.jit(functools.partial(tiny(adaptive=a).apply, details=True))(variables, *arguments)
        for a in (True, False)
    )
    (first, last), (first_fixed, last_fixed) = (
        outputs["details"]["stage_logits"] for outputs in (adaptive, fixed)
    )
    close(first, first_fixed)  # In the first stage they are the same.
    assert np.abs(last - last_fixed).max() > 1e-4


@pytest.mark.parametrize(
    "variant, present, absent",
    [
        ("", "neck lsran stages_0/pan stages_1/pan queries upsampling", "vision/attention_pool"),
        ("baseline", "neck upsampling", "lsran stages_0 queries"),
        ("no_cascade", "lsran", "stages_0 queries"),
        ("no_lsran", "stages_1", "lsran stages_0/pan"),
        ("no_pan", "lsran stages_1", "stages_0/pan"),
        ("no_adaptive", "lsran stages_1/pan", ""),
    ],
)
def test_rows_of_table_2_have_their_parts_only(variant, present, absent):
    changes = dict(stages=0) if variant in ("baseline", "no_cascade") else {}
    model, arguments = tiny(variant, **changes), inputs()
    assert jmceln.get_config(variant).model.adaptive == (variant != "no_adaptive")
    assert jmceln.get_config(variant).model.stages == changes.get("stages", 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    flat = traverse_util.flatten_dict(variables["params"])
    paths = {path[0] for path in flat} | {"/".join(path[:2]) for path in flat}
    assert set(present.split()) <= paths and not set(absent.split()) & paths


def test_every_parameter_is_trained():
    model, (image, tokens, token_mask) = tiny(stages=1), inputs()
    variables = draw(model, image, tokens, token_mask)
    mask = jnp.zeros((2, 64, 64), bool).at[:, 10:40, 20:50].set(True)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        outputs, updated = model.apply(
            {**variables, "params": params},
            image, tokens, token_mask, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        return model.loss(outputs, mask, jnp.ones(2, bool), jax.random.key(0))[0], updated

    grads, updated = gradients(variables["params"])
    for path, grad in traverse_util.flatten_dict(grads).items():
        assert np.isfinite(grad).all()
        # Before a batch norm a bias changes nothing; a key's adds the same to all of a softmax.
        if path[-2:] != ("key", "bias"):
            assert np.abs(grad).max() > 0, path
    for path, new in traverse_util.flatten_dict(updated["batch_stats"]).items():
        old = traverse_util.flatten_dict(variables["batch_stats"])[path]
        assert np.abs(new - old).max() > 0, path


def test_loss_is_the_mean_cross_entropy_of_two_classes():
    logits, mask = normal(2, 3, 4), RNG.random((2, 3, 4)) < 0.5
    probability = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
    right = np.where(mask[0], probability, 1 - probability)
    loss, scalars = tiny().loss({"logits": logits}, mask, np.array([True, False]), None)
    close(loss, -np.log(right).mean())
    assert scalars == {}


@pytest.mark.parametrize(
    "words, total", [("refcoco", 249_918_734), ("refcoco,no_pan", 195_077_354)]
)
def test_paper_size(words, total):
    config = jmceln.get_config(words)
    config.model.text.vocab_size = 49408
    model = models.build(config.model)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 416, 30))
    outputs = jax.eval_shape(
        functools.partial(model.apply, details=True),
        shapes,
        jax.ShapeDtypeStruct((2, 416, 416, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 30), jnp.int32),
        jax.ShapeDtypeStruct((2, 30), jnp.bool_),
    )
    assert [x.shape for x in outputs["details"]["stage_logits"]] == [(2, 416, 416)] * 6
    assert shapes["params"]["queries"].shape == (20, 1024)
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == total


def test_recipe():
    config = jmceln.get_config("refcoco")
    assert (config.data.image_size, config.data.max_tokens) == (416, 30)
    assert (config.optim.lr, config.optim.schedule, config.optim.power) == (6e-6, "poly", 0.9)
    assert (config.train.epochs, config.train.batch_size) == (60, 20)
    assert config.data.tokenizer == "openai/clip-vit-base-patch32"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=12, doublings=3), "config.model.dim=12 must be a multiple"),
        (dict(stages=-1), "config.model.stages=-1"),
        (dict(levels=5), "config.model.levels=5: there are 4 stages"),
        (dict(sentence="cls"), "config.model.sentence='cls' is not one of eot, mean"),
        (dict(dilations=(0, 1)), r"config.model.dilations=\(0, 1\)"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)
