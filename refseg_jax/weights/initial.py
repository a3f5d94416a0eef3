"""Where a new run's parameters start, other than from scratch."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from refseg_jax import checkpoint
from refseg_jax.errors import UserError
from refseg_jax.weights import clip, darknet, hf, microsoft, released, resnet
from refseg_jax.weights.files import OPEN_CLIP, SETTINGS, place_of, read_checkpoint, settings_beside
from refseg_jax.weights.tables import Conversion, Table, brief, closest, convert_variables

# A source, and the variables (shapes) of an encoder -> these, filled.
Load = Callable[[str, Any], Conversion]


def _by(*tables: Table) -> Load:
    """Reads the source by the one of `tables` that knows the most of it."""

    def load(source: str, variables: Any) -> Conversion:
        arrays = read_checkpoint(source).arrays
        return convert_variables(arrays, variables, closest(arrays, variables, tables))

    return load


def _clip(source: str, variables: Any) -> Conversion:
    """Both encoders; of Hugging Face's, whose images are a ViT's, the text encoder alone."""
    path, arrays, _ = read_checkpoint(source, OPEN_CLIP, SETTINGS)
    is_hf = clip.is_hf(arrays)
    activation = "quick_gelu"
    theirs, open_clip = (settings_beside(path, name) for name in SETTINGS)
    if is_hf:
        activation = (theirs.get("text_config") or theirs).get("hidden_act", activation)
    elif path.name in OPEN_CLIP and "model_cfg" in open_clip:
        activation = "quick_gelu" if open_clip["model_cfg"].get("quick_gelu") else "gelu"
    if activation != "quick_gelu":
        raise UserError(
            f"{path} is of a text encoder that computes {activation}, ours computes quick_gelu, as "
            "OpenAI's do"
        )
    if not is_hf:
        return clip.convert_clip(arrays, variables)
    done = clip.convert_clip_text(arrays, {"params": variables["params"]["text"]})
    return dataclasses.replace(done, tree={"params": {"text": done.tree["params"]}})


# Field of `config.init` -> how it is published. The part of that name in a model is filled.
ENCODERS: Mapping[str, Load] = {
    "swin": _by(hf.SWIN, microsoft.SWIN),
    "resnet": _by(resnet.RESNET),
    "darknet": darknet.convert_darknet,
    "bert": _by(hf.BERT),
    "clip": _clip,
}
# Of what holds several parts of a model: their names.
PARTS: Mapping[str, tuple[str, ...]] = {"clip": ("vision", "text")}


def _differs(run: str, config: ml_collections.ConfigDict) -> str:
    """In which of the model's fields a run differs, but for what its parameters do not tell of."""
    training = ("dropout", "drop_path", "dtype", "remat", "cudnn", "draws", "shut_gates")
    changed = [
        field
        for field in checkpoint.changed_fields(checkpoint.read_config(run), config)
        if field.startswith("model.") and field.partition(":")[0].rpartition(".")[2] not in training
    ]
    return f" (differs in {', '.join(changed[:8])})" if changed else ""


def load_initial(config: ml_collections.ConfigDict, variables: Any) -> tuple[dict[str, Any], str]:
    """Parts of `variables` (a tree of shapes) to start from, and a line that says whence.

    Order: `config.init.checkpoint` (everything: a run's workdir, or a released checkpoint of the
    model) > pretrained encoders (the other fields of `config.init`) > scratch. What is no run is
    given as `read_checkpoint` takes it: a file, a directory or a Hugging Face name.

    Raises:
      UserError: a file is missing, damaged, or does not fit.
    """
    source = config.init.checkpoint
    run = str(place_of(source))
    if source and (place_of(source) / checkpoint.CONFIG_FILE).exists():
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            loaded = checkpoint.load_variables(run, variables, here)
        except UserError as error:
            differs = _differs(run, config) if "does not fit" in str(error) else ""
            raise UserError(f"config.init.checkpoint={source}{differs}: {error}") from error
        # Some of it shows in no array's shape, such as the heads of an attention.
        found = f"all parameters from {source}{_differs(run, config)}"
        return jax.tree.map(np.asarray, loaded), found
    if source:
        if config.model.name not in released.TABLES:
            raise UserError(
                f"config.init.checkpoint={source} is not the directory of a run, and there are no "
                f"released checkpoints of {config.model.name} that could be read"
            )
        table = released.TABLES[config.model.name]
        loaded = _load("config.init.checkpoint", source, variables, _by(table))
        return loaded.tree, f"all parameters from {source} ({origin(loaded)})"

    everything = flatten_dict(variables)
    filled, origins = {}, []
    for name, load in ENCODERS.items():
        source = config.init[name]
        if not source:
            continue
        parts = PARTS.get(name, (name,))
        mine = {place: leaf for place, leaf in everything.items() if place[1] in parts}
        if not mine:
            raise UserError(
                f"config.init.{name}={source}, but {config.model.name} as configured has no {name}"
                f" (it has {brief(_modules(everything))}): leave it empty"
            )
        inside = () if name in PARTS else (name,)
        part = {(kind, *path[len(inside) :]): leaf for (kind, *path), leaf in mine.items()}
        loaded = _load(f"config.init.{name}", source, unflatten_dict(part), load)
        arrays = {
            (kind, *inside, *path): x for (kind, *path), x in flatten_dict(loaded.tree).items()
        }
        origins.append(f"{name} ({len(arrays)} arrays) from {source} ({origin(loaded)})")
        filled |= arrays
    if not origins:
        return {}, "from scratch"
    if rest := everything.keys() - filled.keys():
        origins.append(f"the rest ({len(rest)} arrays: {brief(_modules(rest))}) from scratch")
    return unflatten_dict(filled), ", ".join(origins)


def origin(loaded: Conversion) -> str:
    """What was read and what became of it: "Microsoft Swin; 24 position tables resized ..."."""
    return "; ".join([loaded.source, *loaded.notes])


def _load(field: str, source: str, variables: Any, load: Load) -> Conversion:
    try:
        return load(source, variables)
    except UserError as error:
        raise UserError(f"{field}={source}: {error}") from error


def _modules(places: Any) -> list[str]:
    """The parts of the model that hold these leaves, each of a numbered row once."""
    return sorted({re.sub(r"_\d+$", "", path[1]) for path in places})
