"""What a new run starts from: pretrained encoders under every name they are published with."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from configs import coupalign
from refseg_jax import models
from refseg_jax.errors import UserError
from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig
from refseg_jax.train_state import init_variables
from refseg_jax.weights.darknet import darknet_from_file
from refseg_jax.weights.hf import SWIN, bert_from_hf, swin_from_hf
from refseg_jax.weights.initial import load_initial
from refseg_jax.weights.resnet import resnet_from_hf
from tests import tiny
from tests.parity.hf_models import arrays, redraw

SIZES = tiny.FIELDS
WINDOW, LAYERS = 5, 3  # tiny's own window; more layers than tiny has.


def swin_state(window: int) -> dict[str, np.ndarray]:
    """A classifier's, named as in Hugging Face's files."""
    config = transformers.SwinConfig(
        embed_dim=SIZES["model.swin.embed_dim"],
        depths=SIZES["model.swin.depths"],
        num_heads=SIZES["model.swin.num_heads"],
        window_size=window,
        num_labels=3,
    )
    state = arrays(redraw(transformers.SwinForImageClassification(config)).state_dict())
    head = {key: value for key, value in state.items() if key.startswith("classifier.")}
    return head | {
        f"swin.{SWIN.spelling(key)}": value for key, value in state.items() if key not in head
    }


def microsoft(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same classifier as Microsoft's code names it, with its attention masks."""
    result = {}
    for key, value in state.items():
        for theirs, name in (
            ("swin.", ""),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.norm", "patch_embed.norm"),
            ("encoder.layers", "layers"),
            ("layernorm.", "norm."),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("attention.self.relative", "attn.relative"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("classifier.", "head."),
        ):
            key = key.replace(theirs, name)
        if match := re.fullmatch(r"(.*)attention\.self\.query\.(.*)", key):
            parts = [state[f"swin.encoder.{match[1]}attention.self.{n}.{match[2]}"] for n in QKV]
            result[f"{match[1]}attn.qkv.{match[2]}"] = np.concatenate(parts)
        elif "attention.self" not in key:
            result[key] = value
    return result | {"layers.0.blocks.1.attn_mask": np.zeros((4, 9, 9), np.float32)}


QKV = ("query", "key", "value")


@pytest.fixture(scope="module")
def bert_state():
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=SIZES["model.bert.hidden"],
        num_hidden_layers=LAYERS,
        num_attention_heads=SIZES["model.bert.heads"],
        intermediate_size=SIZES["model.bert.intermediate"],
        max_position_embeddings=64,
    )
    model = redraw(transformers.BertForPreTraining(config))
    return {key: np.array(value) for key, value in arrays(model.state_dict()).items()}


@pytest.fixture(scope="module")
def config():
    return tiny.config(model__bert__vocab_size=60)


@pytest.fixture(scope="module")
def variables(config):
    model = models.build(config.model)
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 64, 16))


def start(config, **init):
    config = config.copy_and_resolve_references()
    config.init.update(init)
    return config


def swin_config(config) -> SwinConfig:
    return models.build(config.model).config.swin


def equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_scratch(config, variables):
    assert load_initial(config, variables) == ({}, "from scratch")


def test_both_spellings_of_swin(config, variables, tmp_path):
    state = swin_state(WINDOW)
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    published = {
        f"module.{key}": torch.from_numpy(np.array(v)) for key, v in microsoft(state).items()
    }
    torch.save({"model": published, "optimizer": {}}, tmp_path / "swin.pth")
    expected = {"params": {"swin": swin_from_hf(state, swin_config(config))}}
    count = len(jax.tree.leaves(expected))
    rest = len(jax.tree.leaves(variables)) - count
    for source, kind in (
        (tmp_path, "Hugging Face Swin"),
        (tmp_path / "swin.pth", "Microsoft Swin"),
    ):
        loaded, line = load_initial(start(config, swin=str(source)), variables)
        equal(loaded, expected)
        assert line.startswith(f"swin ({count} arrays) from {source} ({kind}), ")
        named = re.search(rf", the rest \({rest} arrays: (.*)\) from scratch$", line)[1]
        assert "bert" in named and "swin" not in named


@pytest.mark.parametrize("window", [3, 7, 12])
def test_position_tables_of_another_window(config, variables, tmp_path, window):
    state = swin_state(window)
    torch.save({k: torch.from_numpy(v) for k, v in microsoft(state).items()}, tmp_path / "swin.pth")
    loaded, line = load_initial(start(config, swin=str(tmp_path / "swin.pth")), variables)
    blocks = sum(SIZES["model.swin.depths"])
    note = f"Microsoft Swin; {blocks} position tables resized from window {window} to {WINDOW}"
    assert f"({note})" in line
    equal(loaded["params"]["swin"], swin_from_hf(state, swin_config(config)))
    for i in range(blocks):
        name = f"swin.encoder.layers.{i}.blocks.0.attention.self.relative_position_bias_table"
        table, side = torch.from_numpy(state[name]), 2 * window - 1
        expected = torch.nn.functional.interpolate(
            table.T.reshape(1, -1, side, side), size=(2 * WINDOW - 1,) * 2, mode="bicubic"
        )
        ours = loaded["params"]["swin"][f"blocks_{i}_0"]["attention"]["bias_table"]
        np.testing.assert_allclose(ours, expected[0].flatten(1).T, rtol=0, atol=1e-5)


def test_first_layers_of_bert_beside_swin(config, variables, bert_state, tmp_path):
    torch.save(
        {k: torch.from_numpy(v) for k, v in bert_state.items()}, tmp_path / "pytorch_model.bin"
    )
    safetensors.numpy.save_file(swin_state(WINDOW), tmp_path / "swin.safetensors")
    init = dict(swin=str(tmp_path / "swin.safetensors"), bert=str(tmp_path))
    loaded, line = load_initial(start(config, **init), variables)
    assert loaded["params"].keys() == {"swin", "bert"}
    first = {k: v for k, v in bert_state.items() if not re.search(r"layer\.[12]\.", k)}
    sizes = {
        name: SIZES[f"model.bert.{name}"] for name in ("hidden", "layers", "heads", "intermediate")
    }
    equal(
        loaded["params"]["bert"],
        bert_from_hf(first, BertConfig(vocab_size=60, max_positions=64, **sizes)),
    )
    assert f"arrays) from {tmp_path} (Hugging Face BERT; layers 0-0 of 3), the rest (" in line
    assert line.index("swin (") < line.index("bert (") and "bert" not in line.split("the rest")[1]


def test_the_wrong_file_is_one_error_that_names_the_field(config, variables, bert_state, tmp_path):
    state = microsoft(swin_state(WINDOW))
    small = {k: v for k, v in state.items() if not k.startswith("layers.3.")}
    taller = {k: v[:, :1] if k.endswith("position_bias_table") else v for k, v in state.items()}
    broken = {k: v for k, v in bert_state.items() if k != "bert.embeddings.LayerNorm.bias"}
    for name, content, message in (
        ("swin", bert_state, r"not a .* Swin checkpoint .*missing.*unexpected: bert\."),
        ("swin", small, r"not a Microsoft Swin checkpoint .*\d+ missing: layers\.3\."),
        ("swin", taller, r"2 of another shape: layers\.2\.blocks.*bias_table \(81, 1\)"),
        ("swin", state | {"absolute_pos_embed": np.ones(3)}, "1 unexpected: absolute_pos_embed"),
        ("bert", state, "not a Hugging Face BERT checkpoint"),
        ("bert", broken, "1 missing: embeddings.LayerNorm.bias"),
    ):
        path = tmp_path / "model.safetensors"
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in content.items()}, path)
        with pytest.raises(UserError, match=f"^config.init.{name}={path}: .*{message}") as error:
            load_initial(start(config, **{name: str(path)}), variables)
        assert len(str(error.value)) < 3000


def test_other_backbones(tmp_path):
    config = coupalign.get_config("resnet101")
    config.model.resnet.update(width=4, depths=(1, 1, 1))
    config.model.bert.update(hidden=16, heads=2, intermediate=16, vocab_size=50)

    def shapes_of(config):
        model = models.build(config.model)
        return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 64, 8))

    sizes = models.build(config.model).config.resnet
    published = redraw(
        transformers.ResNetModel(
            transformers.ResNetConfig(
                embedding_size=4, hidden_sizes=sizes.widths, depths=sizes.depths
            )
        )
    )
    state = arrays(published.state_dict())
    config.init.resnet = str(tmp_path / "resnet.safetensors")
    safetensors.numpy.save_file(state, config.init.resnet)
    loaded, line = load_initial(config, shapes_of(config))
    expected = resnet_from_hf(state, sizes)
    equal(loaded, {kind: {"resnet": tree} for kind, tree in expected.items()})
    assert line.startswith("resnet (") and "(ResNet (torchvision or Hugging Face)), " in line

    config = coupalign.get_config("darknet53")
    config.model.darknet.update(width=4, depths=(1, 1, 1))
    config.model.bert.update(hidden=16, heads=2, intermediate=16, vocab_size=50)
    config.init.darknet = str(tmp_path / "darknet.weights")
    numbers = np.random.default_rng(0).uniform(0.5, 1.5, 10_000_000).astype("<f4")
    header = np.array([0, 2, 0, 0, 0], "<i4").tobytes()
    (tmp_path / "darknet.weights").write_bytes(header + numbers.tobytes())
    loaded, line = load_initial(config, shapes_of(config))
    expected = darknet_from_file(config.init.darknet, models.build(config.model).config.darknet)
    equal(loaded, {kind: {"darknet": tree} for kind, tree in expected.items()})

    for length in (1, 3, 6, 19, 24):
        (tmp_path / "darknet.weights").write_bytes(header[:length].ljust(length, b"x"))
        with pytest.raises(UserError, match="ends after [01] numbers"):
            darknet_from_file(config.init.darknet, models.build(config.model).config.darknet)

    numbers[3] = np.inf
    (tmp_path / "darknet.weights").write_bytes(header + numbers.tobytes())
    with pytest.raises(UserError, match="not finite in stem_0"):
        darknet_from_file(config.init.darknet, models.build(config.model).config.darknet)
    assert "further numbers left" in line


def test_a_part_that_the_model_lacks(config, variables):
    without = {"params": {k: v for k, v in variables["params"].items() if k != "swin"}}
    with pytest.raises(UserError, match="config.init.swin=x, but alignformer .* has no swin"):
        load_initial(start(config, swin="x"), without)


def test_no_released_checkpoint_of_this_model(config, variables, tmp_path):
    for source in ("absent.pth", str(tmp_path)):
        with pytest.raises(UserError, match="not the directory of a run"):
            load_initial(start(config, checkpoint=source), variables)
