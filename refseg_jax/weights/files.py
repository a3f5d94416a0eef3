"""Any checkpoint file -> numpy arrays by name: safetensors, PyTorch's, in shards, from a hub."""

import contextlib
import json
import pathlib
import re
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from etils import epath

from refseg_jax.errors import UserError
from refseg_jax.weights.pytorch import PICKLE_START, ZIP_START, read_pytorch

# In the order in which they are looked for, in a directory and at Hugging Face.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
# open_clip's, beside which the others may be those of its image encoder alone.
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# Hugging Face's and open_clip's.
SETTINGS = ("config.json", "open_clip_config.json")
_SHARDED = tuple(f"{name}.index.json" for name in _WHOLE)

_READABLE = "give safetensors, a file of torch.save, a directory with one, or a Hugging Face name"


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        path: the file it was read from.
        arrays: by their names in it, in its dtypes; may be read-only.
        beside: names of what it holds beside them, such as "optimizer".
    """

    path: pathlib.Path
    arrays: dict[str, np.ndarray]
    beside: list[str]


def read_checkpoint(
    source: str | pathlib.Path, first: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> Checkpoint:
    """Reads a file, a directory's `model.safetensors` or `pytorch_model.bin`, or a hub's.

    Files of the names `first` come before those two. A hub gives those `beside` it, too, if it has
    them. A bucket's (gs://) are copied for as long as they are read.
    What is not found here but could be a Hugging Face name is asked for there (or in its cache).
    The format is told by the content. No code in a file is ever run.

    Raises:
        UserError: there is no such checkpoint, or it is damaged, cut short, of another kind, or a
            pickle that names code.
    """
    try:
        path = _locate(source, (*first, *_WHOLE), beside)
    except OSError as error:  # Such as a name that is too long for one.
        raise UserError(f"no checkpoint at {source} ({error.strerror}): {_READABLE}") from error
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def settings_beside(path: pathlib.Path, name: str) -> dict[str, Any]:
    """What the settings beside a checkpoint, one of SETTINGS, say; {} where there are none."""
    try:
        settings = json.loads((path.parent / name).read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def place_of(source: str | pathlib.Path) -> pathlib.Path:
    """The path of a source, which may be in a bucket."""
    return epath.Path(source) if _is_remote(source) else pathlib.Path(source).expanduser()


def _is_remote(source: str | pathlib.Path) -> bool:
    return str(source).startswith("gs://")


def _read_remote(path: pathlib.Path) -> Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        try:
            with path.open("rb") as source, open(copy, "wb") as file:
                shutil.copyfileobj(source, file, 2**24)
        except OSError as error:
            raise UserError(f"no checkpoint at {path} ({error}): {_READABLE}") from error
        try:
            return _read_file(copy)._replace(path=path)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error


def _read_file(path: pathlib.Path) -> Checkpoint:
    if _is_remote(path):
        return _read_remote(path)
    try:
        with open(path, "rb") as file:
            start = file.read(100)
    except OSError as error:
        raise UserError(f"no checkpoint at {path} ({error.strerror}): {_READABLE}") from error
    if start[8:9] == b"{":  # Before it the header's size, which may look like anything.
        return Checkpoint(path, _read_safetensors(path), [])
    if not start:
        raise UserError(f"{path} is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
    if start.lstrip().startswith(b"<"):
        raise UserError(
            f"{path} is a web page: the site wanted a confirmation or a login before the download "
            "(Google Drive does for large files). Download it again, in a browser"
        )
    if start.startswith((ZIP_START, PICKLE_START)):
        return Checkpoint(path, *read_pytorch(path))
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path), [])  # Says what is wrong with it.
    raise UserError(f"{path} is no checkpoint of a kind that can be read: {_READABLE}")


def _locate(
    source: str | pathlib.Path, names: tuple[str, ...], beside: tuple[str, ...]
) -> pathlib.Path:
    path = place_of(source)
    if path.is_dir():
        for name in (*names, *_SHARDED):
            if (path / name).is_file():
                return path / name
        raise UserError(f"no checkpoint in {path}: it has neither {' nor '.join(names)}")
    # A suffix says that a file was meant.
    known = path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
    name = r"[\w-][\w.-]*"
    if path.exists() or known or not re.fullmatch(rf"{name}(/{name})?", str(source)):
        return path
    return _download(str(source), names, beside)


def _download(name: str, files: tuple[str, ...], beside: tuple[str, ...]) -> pathlib.Path:
    import huggingface_hub.errors  # Slow to import, and only names need it.

    how: dict[str, bool] = {}

    def fetch(file: str) -> pathlib.Path:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file, **how))

    absent = OSError, ValueError, huggingface_hub.errors.EntryNotFoundError
    reasons = []
    for file in (*files, *_SHARDED):
        try:
            found = fetch(file)
            for shard in sorted(set(_places(found).values())) if file in _SHARDED else ():
                fetch(shard)
            for more in beside:
                with contextlib.suppress(*absent):
                    fetch(more)
            return found
        except absent as error:
            # Nobody answered, after several attempts: what else there is lies in the cache.
            if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
                how = {"local_files_only": True}
            reasons.append(f"{file}: {str(error).strip().splitlines()[0]}")
    raise UserError(
        f"{name} is neither a file or directory here nor a model that Hugging Face can give "
        f"({'; '.join(reasons)}): download it where there is a connection and give its path"
    )


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    # Beside its own error the library lets through what numpy says of an unknown type.
    except Exception as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): download it again, or convert it"
        ) from error


def _places(index: pathlib.Path) -> dict[str, str]:
    """The file beside `index` that each array is said to be in."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        places = {name: str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of checkpoint files: {error!r}") from error
    for file in places.values():
        if pathlib.Path(file).name != file or "\0" in file:
            raise UserError(f"{index} names a file in another directory: {file}")
    return places


def _read_shards(index: pathlib.Path) -> Checkpoint:
    """All files that an index names; each array must come from the one it is said to be in."""
    places = _places(index)
    files = sorted(set(places.values()))
    shards = {file: _read_file(index.parent / file) for file in files}
    found = {name: file for file, shard in shards.items() for name in shard.arrays}
    if wrong := sorted(name for name, _ in places.items() ^ found.items()):
        raise UserError(f"{index} does not fit its files ({wrong[0]}): download all of them again")
    return Checkpoint(
        index,
        {name: array for shard in shards.values() for name, array in shard.arrays.items()},
        [name for shard in shards.values() for name in shard.beside],
    )
