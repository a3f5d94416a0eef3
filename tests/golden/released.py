"""What the tests against released CrossVLT and LAVT share: finding, loading and comparing."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig
from refseg_jax.optim import assign_groups
from refseg_jax.weights.tables import Table

TOLERANCE = 1e-4  # Of a feature's largest absolute value.

# Released feature -> where ours is captured; {n} is the stage counted from 1, {i} from 0, {j} the
# number after it.
SHARED_FEATURES = {
    r"v(\d)\.patch_embed_nchw": "swin/patch_norm",
    r"v(\d)\.block(\d+)": "swin/blocks_{i}_{j}",
    r"v(\d)\.down": "swin/merges_{i}",
    r"decoder\.lowres_logits": "decoder/classifier",
}


def folders(model: str) -> list[pathlib.Path]:
    """Every folder of released outputs whose config.json says `model`."""
    root = os.environ.get("REFSEG_TEST_DATA") or pathlib.Path(__file__).parents[3] / "shared"
    configs = sorted((pathlib.Path(root) / "golden").glob("*/config.json"))
    return [path.parent for path in configs if json.loads(path.read_text())["model"] == model]


def encoder_sizes(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`swin` and `bert` of our config, without dropout, from a folder's config.json."""
    swin, bert = config["swin"], config["bert"]
    return dict(
        swin=SwinConfig(
            patch_size=swin["patch_size"],
            embed_dim=swin["embed_dim"],
            depths=tuple(swin["depths"]),
            num_heads=tuple(swin["num_heads"]),
            window=swin["window_size"],
            drop_path=0.0,
        ),
        bert=BertConfig(
            vocab_size=bert["vocab_size"],
            hidden=bert["hidden_size"],
            layers=layers,
            heads=bert["num_attention_heads"],
            intermediate=bert["intermediate_size"],
            max_positions=bert["max_position_embeddings"],
            dropout=0.0,
        ),
    )


@dataclasses.dataclass
class Case:
    """One folder, and our model with its weights."""

    folder: pathlib.Path
    model: nn.Module
    table: Table
    from_released: Callable[[Mapping[str, np.ndarray], Any], dict[str, Any]]

    @functools.cached_property
    def state(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "state.safetensors")

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        return self.from_released(self.state, self.model.config)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / f"{name}.npz"))

    def json(self, name: str) -> dict[str, Any]:
        """A file about parameters, its keys as the table spells them."""
        content = json.loads((self.folder / f"{name}.json").read_text())
        return {self.table.spelling(key): value for key, value in content.items()}

    def inputs(self, suffix: str = "") -> tuple[np.ndarray, ...]:
        """image, tokens, token_mask."""
        arrays = self.arrays("inputs")
        return (
            arrays[f"image{suffix}"].transpose(0, 2, 3, 1),
            arrays[f"tokens{suffix}"].astype(np.int32),
            arrays[f"attn_mask{suffix}"] > 0,
        )

    @functools.cached_property
    def target(self) -> np.ndarray:
        return self.arrays("inputs")["target"] > 0

    def loss(self, outputs: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        valid = jnp.ones(len(self.target), bool)
        return self.model.loss(outputs, self.target, valid, jax.random.key(0))

    def evaluate(self, suffix: str = "") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Outputs in evaluation, and every submodule's result by its path."""
        apply = functools.partial(
            self.model.apply, capture_intermediates=True, mutable="intermediates"
        )
        outputs, captured = jax.jit(apply)(self.variables, *self.inputs(suffix))
        captured = traverse_util.flatten_dict(captured["intermediates"], sep="/")
        captured = {
            path.removesuffix("/__call__"): np.asarray(results[0])
            for path, results in captured.items()
            if isinstance(results[0], jax.Array)
        }
        return outputs, captured


def relative_error(ours: Any, theirs: np.ndarray) -> float:
    """Largest difference, in units of the reference's largest magnitude."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


Feature = str | tuple[str, Callable[[np.ndarray], np.ndarray]]


def check_features(
    theirs: Mapping[str, np.ndarray],
    captured: Mapping[str, np.ndarray],
    features: Mapping[str, Feature],
) -> None:
    """Every released feature is ours; a feature without an entry in `features` is an error."""
    errors = {}
    for name, expected in theirs.items():
        pattern, place = next((p, f) for p, f in features.items() if re.fullmatch(p, name))
        groups = re.fullmatch(pattern, name).groups()
        place, finish = (place, np.asarray) if isinstance(place, str) else place
        stage = int(groups[0]) if groups else 0
        numbers = dict(n=stage, i=stage - 1, k=stage - 2, j=groups[-1] if groups else 0)
        raw = captured[place.format(**numbers)]
        ours = _like(finish(raw), expected, name)
        assert ours.shape == expected.shape, name
        # A gate is the tanh of far larger numbers, and its rounding is theirs.
        errors[name] = np.abs(ours - expected).max() / np.abs(raw).max()
    assert max(errors.values()) < TOLERANCE, errors


def _like(ours: np.ndarray, expected: np.ndarray, name: str) -> np.ndarray:
    """Our [B,h,w,C] or [B,T,D] in the layout of the released array."""
    if expected.ndim == 4:
        return ours.transpose(0, 3, 1, 2)
    if ours.ndim == 4:
        ours = ours.reshape(len(ours), -1, ours.shape[-1])
    return ours.transpose(0, 2, 1) if name.endswith("_ncl") else ours


def check_logits(outputs: Mapping[str, jax.Array], expected: np.ndarray) -> None:
    assert relative_error(outputs["class_logits"].transpose(0, 3, 1, 2), expected) < TOLERANCE
    difference = expected[:, 1] - expected[:, 0]
    assert relative_error(outputs["logits"], difference) < TOLERANCE


def train_step(case: Case) -> tuple[float, dict[str, jax.Array], dict[str, Any], dict[str, Any]]:
    """Loss, its parts, running statistics and gradients of one step on the batch's statistics.

    In float64, also where modules ask for `jnp.float32`: rounding flips a ReLU of the decoder here
    and there, and one of them moves all gradient norms before it by 1e-3. The released ones have
    such flips; ours need not add to them.
    """
    model = case.model.clone(dtype=jnp.float64)

    def loss_fn(params, variables):
        outputs, updated = model.apply(
            {**variables, "params": params}, *case.inputs(), train=True, mutable="batch_stats"
        )
        loss, scalars = case.loss(outputs)
        return loss, (scalars, updated["batch_stats"])

    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        variables = jax.tree.map(lambda x: np.asarray(x, np.float64), case.variables)
        grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, (scalars, stats)), grads = grad_fn(variables["params"], variables)
        flat = functools.partial(traverse_util.flatten_dict, sep="/")
        return float(loss), scalars, flat(stats), flat(grads)


def check_statistics(case: Case, stats: Mapping[str, jax.Array]) -> None:
    arrays = case.arrays("train_nodrop")
    expected = {
        case.table.spelling(name.removeprefix("bn_after.")): array
        for name, array in arrays.items()
        if name.startswith("bn_after.")
    }
    ours = {case.table.sources(path)[0]: value for path, value in stats.items()}
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert relative_error(ours[name], array) < TOLERANCE, name


def check_gradient_norms(case: Case, grads: Mapping[str, jax.Array]) -> None:
    """Parameter by parameter; those that we keep in one array are taken apart."""
    expected = case.json("train_grad_norms")
    norms = {}
    for path, grad in grads.items():
        names = case.table.sources(path)
        for name, part in zip(names, np.split(np.asarray(grad), len(names), -1), strict=True):
            norms[name] = float(np.linalg.norm(part))
    assert expected.keys() <= norms.keys()
    # What a normalisation or softmax cancels has no gradient but rounding.
    noise = 1e-6 * max(expected.values())
    wrong = {
        name: (norm, expected.get(name, 0.0))
        for name, norm in norms.items()
        if abs(norm - expected.get(name, 0.0)) > 1e-2 * expected.get(name, 0.0) + noise
    }
    assert not wrong, wrong


def check_groups(case: Case, groups: Any, weight_decay: float) -> None:
    """`groups` treat every parameter as the released training script does."""
    expected = case.json("param_groups")
    labels = assign_groups(case.variables["params"], groups)
    for path, label in traverse_util.flatten_dict(labels, sep="/").items():
        _, rate, decay = groups[label]
        ours = decay * weight_decay if rate else None
        for name in case.table.sources(path):
            theirs = expected.pop(name)
            assert (theirs["group"] is None) == (rate == 0), name
            assert theirs["weight_decay"] == ours, name
    assert not expected
