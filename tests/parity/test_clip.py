"""CLIP: the text against `transformers`, the vision against a literal module, and the converters.

Released outputs with the attention pool: tests/golden/test_cris_encoder.py.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from configs import cris, jmceln
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.models.encoders.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
)
from refseg_jax.models.layers.resize import resize_bicubic
from refseg_jax.train_state import init_variables
from refseg_jax.weights.clip import clip_from_openai, clip_text_from_hf, convert_clip
from refseg_jax.weights.initial import load_initial
from refseg_jax.weights.tables import shapes
from tests.parity.hf_models import arrays, redraw, relative_error

TEXT = ClipTextConfig(vocab_size=50, hidden=24, layers=3, heads=4, max_positions=16, embed_dim=12)
VISION = ClipVisionConfig(width=8, depths=(1, 2, 1, 1), embed_dim=12, pool_grid=3)
END = TEXT.vocab_size - 1


class _Bottleneck(nn.Module):
    """CLIP's block, names and operations in its order."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.stride = stride
        if inside != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))
        if hasattr(self, "downsample"):
            x = self.downsample(F.avg_pool2d(x, self.stride))
        return F.relu(x + y)


class _Pool(nn.Module):
    """The parameters of CLIP's attention pool."""

    def __init__(self, channels, grid, out):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid**2, channels))
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(channels, channels))
        self.c_proj = nn.Linear(channels, out)


class _Visual(nn.Module):
    """CLIP's ResNet with the names of its checkpoints; stem and stages."""

    def __init__(self, c: ClipVisionConfig):
        super().__init__()
        half = c.width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = (
            nn.Conv2d(half, c.width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c.width),
        )
        inside = c.width
        for i, depth in enumerate(c.depths):
            blocks = []
            for j in range(depth):
                blocks.append(_Bottleneck(inside, c.width * 2**i, 2 if i and not j else 1))
                inside = 4 * c.width * 2**i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = _Pool(inside, c.pool_grid, c.embed_dim)

    def forward(self, image):
        x = torch.from_numpy(image).permute(0, 3, 1, 2)
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        features = [F.avg_pool2d(x, 2)]
        for i in (1, 2, 3, 4):
            features.append(getattr(self, f"layer{i}")(features[-1]))
        return [x.permute(0, 2, 3, 1) for x in features]


@pytest.fixture(scope="module")
def text():
    return redraw(
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=TEXT.vocab_size,
                hidden_size=TEXT.hidden,
                intermediate_size=4 * TEXT.hidden,
                projection_dim=TEXT.embed_dim,
                num_hidden_layers=TEXT.layers,
                num_attention_heads=TEXT.heads,
                max_position_embeddings=TEXT.max_positions,
                eos_token_id=2,  # Means the largest id.
            )
        )
    )


@pytest.fixture(scope="module")
def openai(text):
    """The same text with OpenAI's names, and a vision beside it."""
    state = {f"visual.{k}": v for k, v in redraw(_Visual(VISION)).state_dict().items()}
    theirs = text.state_dict()
    state["token_embedding.weight"] = theirs["text_model.embeddings.token_embedding.weight"]
    state["positional_embedding"] = theirs["text_model.embeddings.position_embedding.weight"]
    state["text_projection"] = theirs["text_projection.weight"].T
    for leaf in ("weight", "bias"):
        state[f"ln_final.{leaf}"] = theirs[f"text_model.final_layer_norm.{leaf}"]
        for i in range(TEXT.layers):
            old, new = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [theirs[f"{old}.self_attn.{n}_proj.{leaf}"] for n in "qkv"]
            state[f"{new}.attn.in_proj_{leaf}"] = torch.cat(qkv)
            state[f"{new}.attn.out_proj.{leaf}"] = theirs[f"{old}.self_attn.out_proj.{leaf}"]
            for ours, name in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                state[f"{new}.{ours}.{leaf}"] = theirs[f"{old}.{name}.{leaf}"]
            for ours, name in (("c_fc", "fc1"), ("c_proj", "fc2")):
                state[f"{new}.mlp.{ours}.{leaf}"] = theirs[f"{old}.mlp.{name}.{leaf}"]
    state["logit_scale"] = torch.tensor(4.6)
    state |= {
        name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")
    }
    return arrays(state)


def _tokens(batch: int = 3, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Start mark, words, end mark, padding with 0."""
    tokens = np.random.default_rng(0).integers(1, END - 1, size=(batch, length))
    ends = np.array([length, length // 2, 3])[:batch, None]
    tokens[np.arange(length) >= ends] = 0
    np.put_along_axis(tokens, ends - 1, END, 1)
    return tokens.astype(np.int32), np.arange(length) < ends


def _image(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


def test_text(text):
    """Embeddings, every layer, words and sentence; padding included."""
    tokens, token_mask = _tokens()
    with torch.no_grad():
        outputs = text(torch.from_numpy(tokens).long(), output_hidden_states=True)

    def run(clip, tokens, token_mask):
        states = [clip.embed(tokens)]
        for i in range(TEXT.layers):
            states.append(clip.layers(states[-1], i, i + 1))
        return [*states, *clip(tokens, token_mask)]

    params = clip_text_from_hf(arrays(text.state_dict()), TEXT)
    ours = jax.jit(lambda *a: ClipText(TEXT).apply({"params": params}, *a, method=run))(
        tokens, token_mask
    )
    theirs = [*outputs.hidden_states, outputs.last_hidden_state, outputs.text_embeds]
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors


def test_text_in_bfloat16_and_without_a_token(text):
    tokens, token_mask = _tokens()
    token_mask[-1] = False
    params = {"params": clip_text_from_hf(arrays(text.state_dict()), TEXT)}
    remat = dataclasses.replace(TEXT, remat=True)
    jaxpr = jax.make_jaxpr(ClipText(remat).apply)(params, tokens, token_mask)
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert sum("checkpoint" in n or "remat" in n for n in names) == TEXT.layers
    half = jax.jit(ClipText(remat, dtype=jnp.bfloat16).apply)(params, tokens, token_mask)
    full = jax.jit(ClipText(TEXT).apply)(params, tokens, token_mask)
    for a, b in zip(half, full, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.03 * np.abs(b).max()


def test_vision_in_bfloat16():
    half = ClipVision(VISION, dtype=jnp.bfloat16)
    features, _ = jax.eval_shape(half.init_with_output, jax.random.key(0), _image(64, 96))
    assert {x.dtype for x in features} == {jnp.dtype("bfloat16")}
    assert [x.shape[-1] for x in features] == [*VISION.widths, VISION.embed_dim]


@pytest.mark.parametrize("train", [False, True])
def test_vision(openai, train):
    """A size that is odd after every stride; in training by the batch's statistics."""
    config = dataclasses.replace(VISION, pool=False)
    reference = redraw(_Visual(VISION)).train(train)
    image = _image(75, 118)
    with torch.no_grad():
        theirs = reference(image)

    def run(clip, image):
        features = [clip.embed(image, train)]
        for i in range(len(config.depths)):
            features.append(clip.stage(i, clip.merge(i - 1, features[-1], train), train))
        return features

    variables = clip_from_openai(openai, ClipConfig(config, TEXT))
    apply = functools.partial(ClipVision(config).apply, method=run, mutable="batch_stats")
    variables = {name: tree["vision"] for name, tree in variables.items()}
    ours, updated = jax.jit(apply)(variables, image)
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-4, errors
    after = openai | {f"visual.{k}": v for k, v in arrays(reference.state_dict()).items()}
    expected = clip_from_openai(after, ClipConfig(config, TEXT))["batch_stats"]["vision"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        updated["batch_stats"],
        expected,
    )


def test_openai_names_are_the_same_text(openai, text):
    ours = clip_from_openai(openai, ClipConfig(VISION, TEXT))
    jax.tree.map(
        np.testing.assert_array_equal,
        ours["params"]["text"],
        clip_text_from_hf(arrays(text.state_dict()), TEXT),
    )
    assert set(ours["batch_stats"]) == {"vision"}
    # All but `connect`, which starts from scratch.
    fresh = shapes(ClipVision(VISION), _image(32, 32))["params"]
    assert fresh["attention_pool"].pop("connect")
    assert jax.tree.map(np.shape, ours["params"]["vision"]) == jax.tree.map(np.shape, fresh)


@pytest.mark.parametrize(("size", "align_corners"), [((5, 2), False), ((3, 7), True)])
def test_bicubic_resizing(size, align_corners):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    theirs = F.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2),
        size,
        mode="bicubic",
        align_corners=align_corners,
    )
    ours = resize_bicubic(jnp.asarray(x), size, align_corners)
    assert relative_error(ours, theirs.permute(0, 2, 3, 1)) < 1e-5


def test_positions_are_resized_to_another_grid(openai):
    clip = Clip(ClipConfig(dataclasses.replace(VISION, pool_grid=5), TEXT))
    done = convert_clip(openai, shapes(clip, _image(32, 32), *_tokens()))
    assert done.notes == [
        "the attention pool's positions resized from 3 to 5",
        "the attention pool's connect, which it lacks, from scratch",
    ]
    ours = done.tree["params"]["vision"]["attention_pool"]["positions"]
    table = torch.from_numpy(openai["visual.attnpool.positional_embedding"])
    cells = table[1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, (5, 5), mode="bicubic").permute(0, 2, 3, 1).reshape(25, -1)
    assert relative_error(ours, torch.cat([table[:1], cells])) < 1e-5


def test_what_does_not_fit(openai, text):
    with pytest.raises(UserError, match="unexpected: transformer.resblocks.2"):
        clip_from_openai(openai, ClipConfig(VISION, dataclasses.replace(TEXT, layers=2)))
    with pytest.raises(UserError, match=r"positional_embedding \(9, 256\) for our vision/atten"):
        cut = {**openai, "visual.attnpool.positional_embedding": np.zeros((9, 256))}
        clip_from_openai(cut, ClipConfig(VISION, TEXT))
    cut = arrays(text.state_dict())
    del cut["text_model.final_layer_norm.bias"]
    with pytest.raises(UserError, match=r"1 missing: final_layer_norm\.bias"):
        clip_text_from_hf(cut, TEXT)


def test_a_text_encoder_without_projection(text):
    whole = clip_text_from_hf(arrays(text.state_dict()), TEXT)
    ours = clip_text_from_hf(arrays(text.text_model.state_dict()), TEXT)
    assert whole.keys() - ours.keys() == {"projection"}
    jax.tree.map(np.testing.assert_array_equal, {**whole, **ours}, whole)


@pytest.mark.parametrize("projected", [True, False])
def test_a_run_starts_from_a_text_encoder(text, projected, tmp_path):
    config = cris.get_config()
    config.model.vision.embed_dim = TEXT.embed_dim
    config.model.text.update(dataclasses.asdict(TEXT))
    config.model.neck_dims = (8, TEXT.hidden, 8)
    (text if projected else text.text_model).save_pretrained(tmp_path)
    config.init.clip = str(tmp_path)
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 64, 8))
    loaded, origin = load_initial(config, variables)
    expected = clip_text_from_hf(arrays(text.state_dict()), TEXT)
    if not projected:
        del expected["projection"]
        assert "the projection, which it lacks, from scratch" in origin
    jax.tree.map(np.testing.assert_array_equal, loaded, {"params": {"text": expected}})
    assert f"clip ({len(jax.tree.leaves(expected))} arrays)" in origin and "vision" in origin
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="computes gelu, ours computes quick_gelu"):
        load_initial(config, variables)


def test_open_clip_s_names_come_first(openai, tmp_path):
    config = cris.get_config()
    config.model.vision.update(dataclasses.asdict(VISION))
    config.model.text.update(dataclasses.asdict(TEXT))
    config.model.neck_dims = (8, TEXT.hidden, 8)
    config.init.clip = str(tmp_path)
    tower = {k: np.ascontiguousarray(v) for k, v in openai.items() if k.startswith("visual.")}
    safetensors.numpy.save_file(tower, tmp_path / "model.safetensors")
    whole = {k: np.ascontiguousarray(v) for k, v in openai.items()}
    safetensors.numpy.save_file(whole, tmp_path / "open_clip_model.safetensors")
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 64, 8))
    assert load_initial(config, variables)[0]["params"].keys() == {"vision", "text"}
    settings = {"embed_dim": VISION.embed_dim, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')  # Of something else.
    load_initial(config, variables)
    del settings["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(UserError, match="computes gelu, ours computes quick_gelu"):
        load_initial(config, variables)


@pytest.mark.parametrize("pool", [False, True])
def test_a_run_starts_from_it(openai, pool, tmp_path):
    """Both encoders of a model, with the pool that CLIP has or without one."""
    config = cris.get_config() if pool else jmceln.get_config()
    config.model.vision.update({**dataclasses.asdict(VISION), "pool": pool})
    config.model.text.update(dataclasses.asdict(TEXT))
    if pool:
        config.model.neck_dims = (8, TEXT.hidden, 8)
    config.init.clip = str(tmp_path / "clip.safetensors")
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in openai.items()}, config.init.clip
    )
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 64, 8))
    loaded, line = load_initial(config, variables)
    vision = dataclasses.replace(VISION, pool=pool)
    expected = clip_from_openai(openai, ClipConfig(vision, TEXT))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert f"clip ({len(jax.tree.leaves(expected))} arrays) from {config.init.clip}" in line
    assert ("connect, which it lacks, from scratch" in line) == pool
    assert "text" not in line.split("the rest")[1]
