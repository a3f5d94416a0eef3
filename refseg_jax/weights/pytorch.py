"""Files of `torch.save` -> numpy arrays by name, without PyTorch and without running code.

Both layouts are read: the zip archive (PyTorch 1.6 and later) and the stream of pickles before it.
So are archives of TorchScript (`torch.jit.save`), as which OpenAI publishes CLIP: of these the
arrays by the names that `state_dict` would give them, while their code is not looked at.
A pickle is a program that may call whatever Python function it names. Here it is given the few
names that arrays are made of, and empty stand-ins for some that lie beside them; any other is an
error that says which.
"""

import collections
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from refseg_jax import pickles
from refseg_jax.errors import UserError

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"

# Where a training script puts the arrays, in a dict beside its optimiser and its settings.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_NAMED = 5  # In an error.
# The second model of a file: its names get the wrapper's in front. LAVT's BERT.
_SECOND = "bert_model"

_DTYPES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# What training scripts save beside the arrays: settings, scores, devices.
_INERT = {
    ("argparse", "Namespace"),
    ("collections", "Counter"),  # A schedule's milestones.
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    # Where Python 3.13 has them, too.
    *(
        (module, f"{pure}{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for kind in ("Posix", "Windows")
    ),
    *(("datetime", name) for name in ("date", "datetime", "timedelta")),
    ("types", "SimpleNamespace"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Buffer"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "device"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8")),
    *(("torch", name) for name in ("int8", "int16", "int32", "int64")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("yacs.config", "CfgNode"),
    *(
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "dict", "int", "float")
    ),
}

_JIT_VALUES = (
    "build_intlist",
    "build_doublelist",
    "build_boollist",
    "build_tensorlist",
    "restore_type_tag",
)

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # The stream begins with them.


class _Storage(NamedTuple):
    """A run of numbers in the file."""

    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    """Where in its storage an array lies, counted in elements. No attribute of it can be set."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Scripted(dict):
    """A module of a TorchScript archive: its attributes, and nothing of what its class does."""

    def __setstate__(self, state: Any) -> None:
        self.update(state)


class _Unpickler(pickles.Unpickler):
    """Builds plain values, `_Tensor`s and stand-ins; `storages` are those it came by."""

    def __init__(self, file: BinaryIO, path: pathlib.Path):
        super().__init__(file, encoding="utf-8")

        def line() -> bytes:
            text = file.readline()
            if not text.endswith(b"\n"):
                raise EOFError("it ends within a line")
            return text

        self._file_readline = line
        self.path = path
        self.storages: dict[str, _Storage] = {}

        class Inert(dict):
            """Takes whatever a pickle gives an object, and forgets it."""

            __hash__ = object.__hash__

            def __init__(self, *args, **kwargs):
                pass

            def __setstate__(self, state):
                pass

        # Made anew for each file: a pickle may set attributes on what it is given.
        def tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
            if metadata:  # Such as that the numbers count with the other sign.
                raise ValueError(f"a tensor is marked {metadata!r:.100}, which is not known")
            return _Tensor(storage, offset, shape, stride)

        def first(data, *_):
            return data

        def of_type(make, kind, arguments, *_):
            return make(*arguments)

        self._given = {
            **dict.fromkeys(_INERT, Inert),
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            ("torch._tensor", "_rebuild_from_type_v2"): of_type,
            # TorchScript's lists, and values with their types written beside them.
            **{("torch.jit._pickle", name): first for name in _JIT_VALUES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return name  # Only the names of storages name it.
        if module.split(".")[0] == "__torch__":  # A class that the archive itself defines.
            return _Scripted
        try:
            return self._given[module, name]
        except KeyError:
            raise UserError(
                f"{self.path} names {module}.{name}, which is code and no part of an array: do not "
                "trust this file. Nothing of it was run. If it is a whole pickled model, give its "
                "state_dict, best as safetensors"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or any(part is not None for part in view) or type(numel) is not int:
            raise ValueError(f"it refers to {kind!r} in a form that is not known")
        storage = _Storage(key, _DTYPES[dtype], numel)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"it gives storage {key} two types")
        return storage


def read_pytorch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a file of `torch.save` or `torch.jit.save` by name (read-only), and the rest.

    Wrappings such as {"model": ...} are taken off; a second model in "bert_model" has that in
    front of its names. What is no array (optimiser, epoch, settings) is only named.

    Raises:
        UserError: the file is damaged or cut short, holds no arrays by name, or names code.
    """
    try:
        with open(path, "rb") as file:
            archive = file.read(len(ZIP_START)) == ZIP_START
            file.seek(0)
            return _read_archive(file, path) if archive else _read_stream(file, path)
    except UserError:
        raise
    # A damaged file can raise almost anything.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a PyTorch file ({type(error).__name__}: {error}): it is "
            "damaged, cut short or something else; download it again"
        ) from error


def _read_archive(file: BinaryIO, path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    with zipfile.ZipFile(file) as archive:
        # Else a small file could be read as many large ones.
        if sum(info.compress_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
            raise ValueError("its members overlap")

        def member(name: str) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed, which torch.save never does")
            return archive.read(info)  # Fails where its checksum does.

        contents = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(contents) != 1:
            raise ValueError("a zip archive, but not one of torch.save")
        root = contents[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and member(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = _Unpickler(io.BytesIO(member(contents[0])), path).load()
        return _arrays(content, lambda storage: member(f"{root}data/{storage.key}"))


def _read_stream(file: BinaryIO, path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    if _Unpickler(file, path).load() != _MAGIC or _Unpickler(file, path).load() != _PROTOCOL:
        raise ValueError("a pickle, but not one of torch.save")
    if not _Unpickler(file, path).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    unpickler = _Unpickler(file, path)
    content = unpickler.load()
    places = {}
    for key in _Unpickler(file, path).load():
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.numel:
            raise ValueError(f"storage {key} has another size than announced")
        places[key] = file.tell()
        file.seek(storage.numel * storage.dtype.itemsize, os.SEEK_CUR)

    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return _arrays(content, read)


def _arrays(
    content: Any, read: Callable[[_Storage], bytes]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors as arrays: views of their storages, each of which is read once."""
    tensors, beside = _unwrap(content)
    if not tensors:
        raise ValueError(
            "it holds no arrays by name"
            + (f", but {', '.join(beside[:_NAMED]):.200}" if beside else "")
            + f"; where they are not at the top they must be in {' or '.join(_WRAPPERS)}"
        )
    storages: dict[_Storage, np.ndarray] = {}
    arrays = {}
    for name, (storage, offset, shape, stride) in tensors.items():
        if storage not in storages:
            storages[storage] = np.frombuffer(read(storage), storage.dtype)
            if len(storages[storage]) != storage.numel:
                raise ValueError(f"storage {storage.key} of {name} is not whole")
        # What follows must hold, or the view would reach beyond its storage.
        numbers = (offset, *shape, *stride)
        if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(stride):
            raise ValueError(f"{name} has an impossible layout")
        size = int(np.prod(shape, dtype=object))
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if size and (last >= storage.numel or size > storage.numel):
            raise ValueError(f"{name} is larger than its storage")
        strides = [step * storage.dtype.itemsize for step in stride]
        arrays[name] = (
            np.lib.stride_tricks.as_strided(
                storages[storage][offset:], shape, strides, writeable=False
            )
            if size
            else np.zeros(shape, storage.dtype)
        )
    return arrays, beside


def _unwrap(content: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """Tensors by name, from inside any wrapping, and the names of all else."""
    if isinstance(content, _Scripted):
        return _scripted(content), []
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not arrays by name")
    # An empty one is a stand-in, of a model's settings.
    filled = (n for n in _WRAPPERS if isinstance(content.get(n), dict) and content[n])
    wrapper = next(filled, None)
    tensors: dict[str, _Tensor] = {}
    beside = []
    for name, value in content.items():
        if isinstance(value, _Tensor) and wrapper is None:
            found = {str(name): value}
        elif name == wrapper or (name == _SECOND and isinstance(value, dict)):
            found, more = _unwrap(value)
            beside += more
            if name == _SECOND:
                found = {f"{_SECOND}.{key}": tensor for key, tensor in found.items()}
        else:
            beside.append(str(name))
            continue
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"it has {min(twice)} twice")
        tensors |= found
    return tensors, beside


def _scripted(root: _Scripted) -> dict[str, _Tensor]:
    """The tensors of a TorchScript module and those inside it, by dotted names."""
    tensors: dict[str, _Tensor] = {}
    seen: set[int] = set()

    def collect(module: _Scripted, prefix: str) -> None:
        # A module could hold itself, or be in more places than anyone could list.
        if id(module) in seen:
            raise ValueError(f"it has the module {prefix[:-1]!r} in two places")
        seen.add(id(module))
        for name, value in module.items():
            if isinstance(value, _Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Scripted):
                collect(value, f"{prefix}{name}.")

    collect(root, "")
    return tensors
