"""`python -m refseg_jax.weights`: released checkpoints become runs that predict and are scored."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file

from configs import alignformer, crossvlt, lavt
from refseg_jax import models, run
from refseg_jax.errors import UserError
from refseg_jax.predict import Predictor, load_run
from refseg_jax.train_state import init_variables
from refseg_jax.weights import released
from refseg_jax.weights.__main__ import convert_run
from refseg_jax.weights.files import read_checkpoint
from refseg_jax.weights.initial import load_initial
from refseg_jax.weights.tables import convert_variables
from tests.golden.released import Case, check_logits, folders

REPO = pathlib.Path(__file__).resolve().parents[2]
SCENES = dict.fromkeys(("train", "val", "testA", "testB"), 1)


def overrides(sizes: dict, **model) -> dict:
    """Fields of our config for the sizes in a golden folder's config.json."""
    swin, bert = sizes["swin"], sizes["bert"]
    return {
        "model.swin.embed_dim": swin["embed_dim"],
        "model.swin.depths": tuple(swin["depths"]),
        "model.swin.num_heads": tuple(swin["num_heads"]),
        "model.swin.window": swin["window_size"],
        "model.swin.positions": False,
        "model.bert.hidden": bert["hidden_size"],
        "model.bert.heads": bert["num_attention_heads"],
        "model.bert.intermediate": bert["intermediate_size"],
        "model.bert.vocab_size": bert["vocab_size"],
        "model.bert.max_positions": bert["max_position_embeddings"],
        "data.tokenizer": "shapes",
        "data.max_tokens": sizes["max_tokens"],
        "data.image_size": 64,
        "mesh.data": 1,
        **{f"model.{name}": value for name, value in model.items()},
        **{f"data.shapes_scenes.{split}": count for split, count in SCENES.items()},
    }


def apply(config, fields):
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def read(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    sizes = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "state.safetensors")
    return sizes, {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def check_against_golden(workdir, folder, table):
    """The run's model gives the golden's logits (by the program that the golden tests compile)."""
    _, model, variables = load_run(workdir)
    case = Case(folder, model, table, None)
    case.variables = variables
    check_logits(case.evaluate()[0], case.arrays("eval_outputs")["logits"])


@pytest.mark.parametrize("folder", folders("crossvlt"), ids=lambda folder: folder.name)
def test_crossvlt_as_a_training_script_saves_it(folder, tmp_path):
    sizes, state = read(folder)
    first, *plain = sizes["bert"]["plain_layers_per_stage"]
    model = {
        "bert.layers": first,
        "language_depths": tuple(n + 1 for n in plain),
        "align_dim": sizes["align_dim"],
        "head_dim": 64,
    }
    config = apply(crossvlt.get_config(), overrides(sizes, **model))
    content = {
        "model": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": argparse.Namespace(lr=3e-5),
    }
    torch.save(content, tmp_path / "best.pth")
    done = convert_run(config, str(tmp_path / "best.pth"), None, str(tmp_path / "run"))
    check_against_golden(tmp_path / "run", folder, released.CROSSVLT_TABLE)

    trained = [x for name, x in state.items() if x.is_floating_point() and "running_" not in name]
    assert done["parameters"] == sum(x.numel() for x in trained)
    assert done["origin"] == f"{tmp_path / 'best.pth'} (released CrossVLT)"
    assert done["beside"] == ["optimizer", "args"]
    blocks = sum(sizes["swin"]["depths"])
    assert done["dropped"]["backbone.layers.*.blocks.*.attn.relative_position_index"] == blocks


@pytest.mark.parametrize("folder", folders("lavt"), ids=lambda folder: folder.name)
def test_lavt_in_two_files_by_the_command_line(folder, tmp_path):
    sizes, state = read(folder)
    inside = {name: x for name, x in state.items() if name.startswith("text_encoder.")}
    outside = {name: x for name, x in state.items() if name not in inside}
    inside = {name.removeprefix("text_encoder."): x for name, x in inside.items()}
    inside |= {"pooler.dense.weight": torch.ones(2, 2)}
    torch.save({"model": outside, "bert_model": inside, "epoch": 39}, tmp_path / "both.pth")
    torch.save({"model": outside}, tmp_path / "image.pth")
    # As older files of Hugging Face have it.
    spelled = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in inside.items()
    }
    assert spelled.keys() != inside.keys()
    torch.save({f"module.{name}": x for name, x in spelled.items()}, tmp_path / "text.bin")

    layers = sizes["bert"]["num_hidden_layers"]
    model = {"bert.layers": layers, "fusion_heads": tuple(sizes["fusion_heads"])}
    fields = overrides(sizes, **model)
    command = [sys.executable, "-m", "refseg_jax.weights", "--config", "configs/lavt.py"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    command += ["--checkpoint", str(tmp_path / "image.pth")]
    command += ["--text_checkpoint", str(tmp_path / "text.bin"), "--workdir", str(tmp_path / "a")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["dropped"]["text_encoder.pooler.dense.weight"] == 1
    check_against_golden(tmp_path / "a", folder, released.LAVT_TABLE)

    config, model, variables = load_run(tmp_path / "a")
    in_one_file = read_checkpoint(tmp_path / "both.pth").arrays
    jax.tree.map(
        np.testing.assert_array_equal,
        variables,
        released.lavt_from_released(in_one_file, model.config),
    )
    for source, text, message in (
        ("image.pth", None, "not a released LAVT checkpoint .*missing: text_encoder"),
        ("both.pth", "text.bin", "the first checkpoint holds a text encoder"),
        ("image.pth", "both.pth", "unexpected: "),
    ):
        text = text and str(tmp_path / text)
        with pytest.raises(UserError, match=message):
            convert_run(config, str(tmp_path / source), text, str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def tiny_config(module):
    return apply(
        module.get_config(),
        {
            "model.swin.embed_dim": 8,
            "model.swin.depths": (1, 1, 1, 1),
            "model.swin.num_heads": (1, 1, 2, 2),
            "model.swin.window": 2,
            "model.bert.hidden": 16,
            "model.bert.heads": 2,
            "model.bert.intermediate": 16,
            "model.bert.layers": 1,
            "data.image_size": 32,
            "mesh.data": 1,
            "eval.batch_size": 8,
            **{f"data.shapes_scenes.{split}": count for split, count in SCENES.items()},
        },
    )


def published(config, table) -> dict[str, torch.Tensor]:
    """A checkpoint that fits `config`, with random values."""
    run.fit_tokenizer(config, config.data.tokenizer)
    model = models.build(config.model)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), 32, 8))
    generator, state = torch.Generator().manual_seed(0), {}
    for place, leaf in traverse_util.flatten_dict(variables).items():
        names = table.sources("/".join(place[1:]))
        shape = (*leaf.shape[:-1], leaf.shape[-1] // len(names))
        if place[-1] == "kernel":
            shape = (*shape[::-1][:2], *shape[:-2])
        for name in names:
            state[name] = torch.rand(shape, generator=generator) + 0.5
    return state


@pytest.fixture(scope="module")
def lavt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lavt") / "lavt_one.pth"
    torch.save(published(tiny_config(lavt), released.LAVT_TABLE), path)
    return path


def test_a_converted_run_is_scored_and_trained_on_from(lavt_file, tmp_path):
    config, workdir = tiny_config(lavt), str(tmp_path / "run")
    convert_run(config, str(lavt_file), None, workdir)
    summary = run.run(config, workdir, "evaluate")
    assert 0 <= summary["val/mIoU"] <= 1 and pathlib.Path(summary["report"]).is_file()
    prediction = Predictor.from_workdir(workdir)(np.zeros((20, 30, 3), np.uint8), "red")
    assert prediction.mask.shape == (20, 30)

    with pytest.raises(UserError, match="converted checkpoint .* another --workdir"):
        run.run(config, workdir, "train")
    _, _, variables = load_run(workdir)
    for source, origin in ((workdir, ""), (str(lavt_file), " (released LAVT)")):
        config.init.checkpoint = source
        loaded, line = load_initial(config, variables)
        assert line == f"all parameters from {source}{origin}"
        jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_crossvlt_files_made_for_testing_lack_the_temperatures():
    """Published ones: no wrapping, and nothing of what only the loss reads."""
    state = published(config := tiny_config(crossvlt), released.CROSSVLT_TABLE)
    arrays = {name: tensor.numpy() for name, tensor in state.items() if name != "temp"}
    model = models.build(config.model)
    variables = released.crossvlt_from_released(arrays, model.config)
    np.testing.assert_array_equal(variables["params"]["temperature"], np.ones(4))
    loaded = convert_variables(arrays, variables, released.CROSSVLT_TABLE)
    assert loaded.notes == ["temperature, which it lacks, at 1.0"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_nothing_is_run_or_written_where_a_checkpoint_is_bad(lavt_file, tmp_path):
    config = tiny_config(lavt)
    state = torch.load(lavt_file, weights_only=True)
    whole, marker = lavt_file.read_bytes(), tmp_path / "marker"
    name = "backbone.patch_embed.proj.weight"
    other = published(tiny_config(crossvlt), released.CROSSVLT_TABLE)
    for content, message in (
        (whole[: len(whole) // 2], "damaged, cut short"),
        (b"<html>Sign in</html>", "web page"),
        (b"a text about LAVT", "no checkpoint of a kind"),
        ({"model": state, "args": Evil(marker)}, r"posix\.system"),
        (other, "not a released LAVT checkpoint .*missing.*unexpected"),
        ({**state, name: torch.ones(9, 3, 4, 4)}, rf"1 of another shape: {name} \(9, 3, 4, 4\)"),
        ({**state, name: state[name] * torch.nan}, "1 not finite"),
        ({**state, f"module.{name}": state[name]}, f"there twice: module.{name} and {name}"),
    ):
        path = tmp_path / "file.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            convert_run(config, str(path), None, str(tmp_path / "run"))
        assert str(path) in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["file.pth"], message


def test_a_workdir_in_use_and_a_model_without_checkpoints(lavt_file, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty: give another --workdir"):
        convert_run(tiny_config(lavt), str(lavt_file), None, str(tmp_path))
    with pytest.raises(UserError, match="cannot write --workdir"):
        convert_run(tiny_config(lavt), str(lavt_file), None, str(tmp_path / "notes.txt" / "run"))
    with pytest.raises(UserError, match="no released checkpoints of alignformer"):
        convert_run(alignformer.get_config(), str(lavt_file), None, str(tmp_path / "run"))
    with pytest.raises(UserError, match="crossvlt holds its text encoder"):
        convert_run(tiny_config(crossvlt), str(lavt_file), str(lavt_file), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "--config is missing"),
        (["--config=configs/lavt.py", "--workdir=x"], "--checkpoint is missing"),
        (["--config=configs/lavt.py", "--workdir=x", "--checkpoint=absent.pth"], "absent.pth"),
    ],
)
def test_bad_input_is_one_line(arguments, expected):
    done = subprocess.run(
        [sys.executable, "-m", "refseg_jax.weights", *arguments],
        cwd=REPO, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0] and "Traceback" not in done.stderr
