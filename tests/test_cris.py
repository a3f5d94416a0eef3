"""CRIS: against the authors' released code over every folder of its outputs, and its own parts."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file

from configs import cris
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.models.cris import CRIS, CRISConfig, DoubleConv, Projector, pixel_positions
from refseg_jax.models.encoders.clip import ClipTextConfig, ClipVisionConfig
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.resize import resize_bilinear
from refseg_jax.optim import assign_groups, make_optimizer, make_schedule
from refseg_jax.predict import load_run, make_predict_step
from refseg_jax.train import train_step
from refseg_jax.train_state import init_state, init_variables
from refseg_jax.weights.__main__ import convert_run
from refseg_jax.weights.released import CRIS_TABLE, cris_from_released
from tests.golden import released

RNG, KEY = np.random.default_rng(0), jax.random.key(0)

# Released feature -> where ours is captured. The encoders' are in golden/test_cris_encoder.py.
FEATURES = {
    r"neck\.txt_proj": ("neck/sentence_norm", jax.nn.relu),
    r"neck\.f1_v_proj": "neck/coarse",
    r"neck\.norm_layer": ("neck/coarse_norm", jax.nn.relu),
    r"neck\.f2_v_proj": "neck/middle",
    r"neck\.f2_cat": "neck/middle_join",
    r"neck\.f3_v_proj": "neck/fine",
    r"neck\.f3_cat": "neck/fine_join",
    r"neck\.f4_proj5": "neck/coarse_out",
    r"neck\.f4_proj4": "neck/middle_out",
    r"neck\.f4_proj3": "neck/fine_out",
    r"neck\.aggr": "neck/join",
    r"neck\.coordconv": "neck/out",
    r"dec\.layer(\d+)_lnd": ("decoder/layer{n}", lambda x: x.transpose(1, 0, 2)),
    r"dec\.out_ncl": "decoder/norm",
    r"proj\.txt": "projector/sentence",
}


class Case(released.Case):
    """The tokens of this model's folders say themselves which are real."""

    def inputs(self, suffix=""):
        arrays = self.arrays("inputs")
        tokens = arrays["tokens"].astype(np.int32)
        return arrays["image"].transpose(0, 2, 3, 1), tokens, tokens != 0

    @functools.cached_property
    def target(self):
        return self.arrays("inputs")["target"][:, 0] > 0


def config_of(sizes) -> CRISConfig:
    """Ours, without dropout, from a folder's config.json."""
    settings, clip = sizes["cfg"], sizes["clip"]
    return CRISConfig(
        vision=ClipVisionConfig(
            width=clip["vision_width"],
            depths=tuple(clip["vision_layers"]),
            embed_dim=clip["embed_dim"],
            pool_grid=clip["image_resolution"] // 32,
        ),
        text=ClipTextConfig(
            vocab_size=clip["vocab_size"],
            hidden=clip["transformer_width"],
            layers=clip["transformer_layers"],
            heads=clip["transformer_heads"],
            max_positions=clip["context_length"],
            embed_dim=clip["embed_dim"],
        ),
        neck_dims=tuple(settings["fpn_out"]),
        decoder_layers=settings["num_layers"],
        heads=settings["num_head"],
        ffn=settings["dim_ffn"],
        dropout=0.0,
    )


@pytest.fixture(scope="module", params=released.folders("cris"), ids=lambda folder: folder.name)
def case(request):
    sizes = json.loads((request.param / "config.json").read_text())
    return Case(request.param, CRIS(config_of(sizes)), CRIS_TABLE, cris_from_released)


def test_evaluation(case):
    outputs, captured = case.evaluate()
    expected = case.arrays("eval_outputs")
    for name in ("logits", "logits_f64"):
        error = released.relative_error(outputs["logits"], expected[name][:, 0])
        assert error < released.TOLERANCE
    theirs = {
        name: array
        for name, array in case.arrays("eval_features").items()
        if name.startswith(("neck.", "dec.", "proj."))
    }
    mix = case.variables["params"]["projector"]
    mapped = ("projector/up2", lambda x: x @ mix["kernel"][0, 0] + mix["bias"])
    released.check_features(theirs, captured, {**FEATURES, r"proj\.vis": mapped})
    np.testing.assert_allclose(case.loss(outputs)[0], expected["loss"], rtol=1e-5)


def test_positions(case):
    tables = case.arrays("eval_outputs")
    (name,) = (name for name in tables if name.startswith("pos2d_"))
    dim, h, w = map(int, name.split("_")[1:])
    np.testing.assert_allclose(pixel_positions(h, w, dim), tables[name][:, 0], atol=1e-6)


def test_probabilities_are_resized_as_released(case):
    expected = case.arrays("eval_outputs")
    logits, probability = expected["logits"][:, 0], expected["prob_up_bicubic_ac"][:, 0]
    stand_in = types.SimpleNamespace(
        resizes_probabilities=CRIS.resizes_probabilities,
        apply=lambda *_, **__: {"logits": jnp.asarray(logits)},
    )
    image, tokens, token_mask = case.inputs()
    batch = dict(image=np.zeros(image.shape, np.uint8), tokens=tokens, token_mask=token_mask)
    ours = make_predict_step(stand_in)({}, batch)
    assert released.relative_error(ours, probability) < released.TOLERANCE
    np.testing.assert_array_equal(
        ours > cris.get_config("refcoco").eval.threshold, expected["pred_035"][:, 0]
    )


def test_training(case):
    loss, _, stats, grads = released.train_step(case)
    np.testing.assert_allclose(loss, case.arrays("train_nodrop")["loss"], rtol=1e-5)
    released.check_statistics(case, stats)
    # The released norms are of a float32 run whose rounding flips ReLUs: of the stem's 4 channels
    # they are up to 1.5e-2 from the same code's norms in float64, where ours are 2e-3 from them.
    expected = case.json("train_grad_norms")
    norms = {CRIS_TABLE.sources(path)[0]: np.linalg.norm(grad) for path, grad in grads.items()}
    assert norms.keys() == expected.keys()
    # What a softmax cancels has no gradient but rounding.
    noise = 1e-6 * max(expected.values())
    errors = {k: (abs(norms[k] - x) - noise) / x for k, x in expected.items()}
    assert max(errors.values()) < 3e-2, errors
    assert np.median(list(errors.values())) < 2e-3


def test_optimiser_groups(case):
    groups = cris.get_config("refcoco").optim.groups
    theirs = case.json("param_groups")
    sizes = json.loads((case.folder / "config.json").read_text())
    rates = {"backbone": sizes["cfg"]["lr_multi"], "head": 1.0}
    labels = assign_groups(case.variables["params"], groups)
    for path, label in traverse_util.flatten_dict(labels, sep="/").items():
        (name,) = CRIS_TABLE.sources(path)
        assert groups[label][1] == rates[theirs.pop(name)["group"]], name
    assert list(theirs) == ["backbone.logit_scale"]  # Which nothing reads.


def test_conversion_of_what_the_training_script_saves(case, tmp_path):
    ours = case.model.config
    config = cris.get_config()
    config.model.vision.update(
        {k: v for k, v in dataclasses.asdict(ours.vision).items() if k in config.model.vision}
    )
    config.model.text.update(dataclasses.asdict(ours.text))
    fields = ("neck_dims", "decoder_layers", "heads", "ffn", "dropout")
    config.model.update({name: getattr(ours, name) for name in fields})
    config.model.update(sentence="eot", prior=0.0)
    config.data.update(image_size=64, shapes_scenes=dict(train=1, val=1, testA=1, testB=1))
    state = load_file(case.folder / "state.safetensors")
    content = {
        "epoch": 50,
        "state_dict": {f"module.{k}": torch.from_numpy(np.array(v)) for k, v in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "best_iou": np.float64(0.7),
    }
    torch.save(content, tmp_path / "best_model.pth")
    source = str(tmp_path / "best_model.pth")
    done = convert_run(config, source, None, str(tmp_path / "run"))
    assert done["dropped"]["backbone.logit_scale"] == 1 and "optimizer" in done["beside"]
    _, model, variables = load_run(tmp_path / "run")
    assert dataclasses.replace(model.config, dropout=0.0) == ours
    jax.tree.map(np.testing.assert_array_equal, variables, case.variables)

    del content["state_dict"]["module.proj.txt.bias"]
    torch.save(content, tmp_path / "best_model.pth")
    with pytest.raises(UserError, match="not a released CRIS .*1 missing: proj.txt.bias"):
        convert_run(config, source, None, str(tmp_path / "other"))


# Parts of our own.


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def fill(variables):
    """Numbers for shapes, without compiling what draws them; running variances positive."""
    return jax.tree.map(lambda x: np.abs(normal(*x.shape)) / max(1, x.size) ** 0.25, variables)


def test_projector_is_a_convolution_with_the_sentence_s_kernel():
    x, sentence = normal(2, 2, 3, 8), normal(2, 5)
    module = Projector(4)
    variables = fill(jax.eval_shape(functools.partial(module.init, train=False), KEY, x, sentence))
    params = variables["params"]
    keep = dict(train=False, mutable="intermediates", capture_intermediates=True)
    ours, seen = jax.jit(functools.partial(module.apply, **keep))(variables, x, sentence)
    assert ours.shape == (2, 8, 12)
    (x,) = seen["intermediates"]["up2"]["__call__"]
    x = np.asarray(x @ params["kernel"][0, 0] + params["bias"]).transpose(0, 3, 1, 2)
    said = sentence @ params["sentence"]["kernel"] + params["sentence"]["bias"]
    for image, kernel, logits in zip(x, said, ours, strict=True):
        kernel, bias = kernel[:-1].reshape(1, 4, 3, 3), kernel[-1]
        tensors = (torch.from_numpy(np.array(array)) for array in (image[None], kernel))
        close(logits, torch.nn.functional.conv2d(*tensors, padding=1)[0, 0].numpy() + bias)


def test_upsampled_convolution_is_one_of_the_upsampled_map():
    x, module = normal(1, 2, 3, 4), DoubleConv(5)
    variables = fill(jax.eval_shape(functools.partial(module.init, train=False), KEY, x))
    larger, part = resize_bilinear(x, (4, 6)), {}
    for kind, tree in variables.items():
        part[kind] = {"norm": tree["norm"]}
    part["params"]["conv"] = {"kernel": variables["params"]["kernel"]}
    expected = ConvNorm(5, 3, activation=jax.nn.relu).apply(part, larger, train=False)
    close(module.apply(variables, x, train=False), expected)


def test_training_from_scratch_starts_at_the_prior():
    x, sentence = normal(2, 2, 3, 96), normal(2, 96)
    plain, calm = (
        jax.jit(functools.partial(Projector(48, p).init_with_output, train=False))(
            KEY, x, sentence
        )[0]
        for p in (0.0, 0.05)
    )
    np.testing.assert_allclose(np.median(jax.nn.sigmoid(calm)), 0.05, atol=0.03)
    assert calm.std() < 0.2 * plain.std()


def tiny(**changes):
    config = cris.get_config().model
    config.vision.update(width=4, depths=(1, 1, 1, 1), embed_dim=12)
    config.text.update(hidden=8, layers=1, heads=2, embed_dim=12, vocab_size=50)
    config.update(neck_dims=(4, 8, 12), decoder_layers=1, heads=2, ffn=8)
    config.update(changes)
    return models.build(config)


def inputs(side=64):
    tokens = jnp.asarray(RNG.integers(1, 50, (4, 6)))
    token_mask = jnp.arange(6) < jnp.array([[6], [4], [3], [6]])
    return jnp.asarray(normal(4, side, side, 3)), tokens, token_mask


@pytest.fixture(scope="module")
def small():
    """Variables of a tiny model, and what goes in: a size that is no multiple of 32."""
    arguments = inputs(80)
    return fill(jax.eval_shape(tiny().init, KEY, *arguments)), arguments


@pytest.mark.parametrize("sentence", ["eot", "mean"])
def test_words_are_read_and_padding_is_not(small, sentence):
    variables, (image, tokens, token_mask) = small
    model = tiny(sentence=sentence)
    predict = jax.jit(lambda tokens: model.apply(variables, image, tokens, token_mask)["logits"])
    logits = predict(tokens)
    assert logits.shape == (4, 20, 20) and logits.dtype == jnp.float32
    close(predict(jnp.where(token_mask, tokens, 7)), logits)
    changed = predict(tokens.at[0, 1].set(tokens[0, 1] % 49 + 1))
    assert np.abs(changed[0] - logits[0]).max() > 1e-3
    close(changed[1:], logits[1:])


def test_every_parameter_is_trained(small):
    model, (variables, arguments) = tiny(), small
    mask = jnp.zeros((4, 80, 80), bool).at[:, 10:40, 20:50].set(True)

    def loss_fn(params):
        outputs, _ = model.apply(
            {**variables, "params": params}, *arguments, train=True, mutable=["batch_stats"]
        )
        return model.loss(outputs, mask, jnp.ones(4, bool), KEY)[0]

    loss, gradients = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    assert np.isfinite(loss)
    for path, gradient in traverse_util.flatten_dict(gradients).items():
        assert np.isfinite(gradient).all(), path
        # A bias of the keys moves all logits of a softmax alike.
        assert path[-2:] == ("key", "bias") or np.abs(gradient).max() > 0, path


def test_loss_reads_the_mask_s_nearest_pixels_of_valid_rows():
    model = tiny()
    mask = RNG.random((3, 8, 12)) < 0.4
    logits = jnp.asarray(normal(3, 2, 3))
    loss, scalars = model.loss({"logits": logits}, mask, np.array([True, True, False]), None)
    label = torch.from_numpy(mask[:2, ::4, ::4].astype(np.float32))
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(np.array(logits[:2])), label
    )
    close(loss, theirs.item())
    assert scalars == {}


def test_other_models_logits_are_resized_as_before():
    logits = normal(1, 4, 4)
    stand_in = types.SimpleNamespace(apply=lambda *_, **__: {"logits": jnp.asarray(logits)})
    batch = dict(image=np.zeros((1, 9, 9, 3), np.uint8), tokens=0, token_mask=0)
    expected = jax.nn.sigmoid(resize_bilinear(jnp.asarray(logits), (9, 9)))
    close(make_predict_step(stand_in)({}, batch), expected)


# Recipes.


def abstract_variables(config):
    config.model.text.vocab_size = config.model.text.vocab_size or 49408
    model = models.build(config.model)
    size, tokens = config.data.image_size, config.data.max_tokens
    return model, jax.eval_shape(lambda: init_variables(model, KEY, size, tokens))


def test_training_step_carries_the_running_statistics():
    """Shapes only: the state that comes out fits where it came from."""
    config = cris.get_config()
    model, variables = abstract_variables(config)
    tx, _ = make_optimizer(config.optim, variables["params"], 1000)
    state = jax.eval_shape(
        lambda variables, key: init_state(variables, lambda _: tx, key, False),
        variables,
        KEY,
    )
    B, H, T = 4, config.data.image_size, config.data.max_tokens
    batch = dict(
        image=jax.ShapeDtypeStruct((B, H, H, 3), jnp.uint8),
        mask=jax.ShapeDtypeStruct((B, H, H), jnp.bool_),
        tokens=jax.ShapeDtypeStruct((B, T), jnp.int32),
        token_mask=jax.ShapeDtypeStruct((B, T), jnp.bool_),
        valid=jax.ShapeDtypeStruct((B,), jnp.bool_),
    )
    step = functools.partial(train_step, model=model, tx=tx, accumulate=1)
    after, scalars = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert "loss" in scalars


@pytest.mark.parametrize(
    "variant, vision, total",
    [("refcoco", 57_309_536, 161_251_681), ("refcoco,resnet50", 40_416_096, 146_849_121)],
)
def test_paper_size(variant, vision, total):
    config = cris.get_config(variant)
    model, variables = abstract_variables(config)
    assign_groups(variables["params"], config.optim.groups)
    outputs = jax.eval_shape(
        model.apply,
        variables,
        jax.ShapeDtypeStruct((2, 416, 416, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 17), jnp.int32),
        jax.ShapeDtypeStruct((2, 17), jnp.bool_),
    )
    assert outputs["logits"].shape == (2, 104, 104)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert (count(variables["params"]["vision"]), count(variables["params"])) == (vision, total)


def test_recipe():
    config = cris.get_config("refcoco")
    assert (config.data.image_size, config.data.max_tokens, config.eval.threshold) == (
        416,
        17,
        0.35,
    )
    assert (config.train.epochs, config.train.batch_size) == (50, 64)
    assert config.optim.weight_decay == 0 and cris.get_config("refcocog_umd").data.max_tokens == 22
    schedule = make_schedule(config.optim, 5000)
    rates = [schedule(step) for step in (0, 1750, 3499, 3500, 4999)]
    np.testing.assert_allclose(rates, [1e-4, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sentence": "cls"}, "sentence='cls'"),
        ({"neck_dims": (4, 8)}, r"neck_dims=\(4, 8\)"),
        ({"neck_dims": (4, 12, 8)}, "text.hidden=8"),
        ({"heads": 3}, "neck_dims"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(UserError, match=f"config.model.{message}"):
        tiny(**changes)


def test_the_attention_pool_is_needed():
    with pytest.raises(UserError, match="config.model.vision: .*attention pool"):
        CRISConfig(vision=ClipVisionConfig(pool=False))
