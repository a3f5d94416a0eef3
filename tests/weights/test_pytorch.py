"""Files of torch.save and torch.jit.save: the arrays that PyTorch reads, and nothing else."""

import argparse
import builtins
import collections
import copy
import datetime
import os
import pathlib
import pickle
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch

from refseg_jax.errors import UserError
from refseg_jax.weights.pytorch import read_pytorch

LAYOUTS = {"archive": {}, "stream": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=LAYOUTS)
def save(request, tmp_path):
    def save(content, name="file.pth") -> pathlib.Path:
        torch.save(content, tmp_path / name, **LAYOUTS[request.param])
        return tmp_path / name

    return save


def tensors() -> dict[str, torch.Tensor]:
    """Every type and layout that a checkpoint may have."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, 4, generator=generator)
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    types += (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    return {
        **{str(kind): (10 * base[0]).abs().to(kind) for kind in types},
        "whole": base,
        "part": base[2:4, 1::3],
        "transposed": base.transpose(0, 2),
        "column": base[:, 3, 1],
        "channels_last": base[None].contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(base[0]),
    }


def test_as_pytorch_reads(save):
    path = save(tensors())
    arrays, beside = read_pytorch(path)
    expected = torch.load(path, weights_only=True)
    assert list(arrays) == list(expected) and beside == []
    for name, tensor in expected.items():
        array = arrays[name]
        assert str(tensor.dtype) == f"torch.{array.dtype}"
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            array, tensor = array.astype(np.float32), tensor.float()
        np.testing.assert_array_equal(array, tensor.numpy(), strict=True)


def test_a_model_s_own_state(save):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
    arrays, _ = read_pytorch(save(model.state_dict()))  # An OrderedDict with attributes.
    assert arrays.keys() == model.state_dict().keys()


def test_training_scripts_file(save):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = argparse.Namespace(lr=1e-3, device=torch.device("cpu"), mha="", out=pathlib.Path())
    content = {
        "model": model.state_dict(),
        "bert_model": {"embeddings.weight": torch.ones(2)},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "best": np.float64(0.7),
        "args": arguments,
        "classes": {1, 2},
        "scores": collections.defaultdict(list, a=[1]),
    }
    arrays, beside = read_pytorch(save(content))
    assert list(arrays) == ["weight", "bias", "bert_model.embeddings.weight"]
    np.testing.assert_array_equal(arrays["weight"], model.weight.detach().numpy())
    assert beside == list(content)[2:]


def test_microsoft_s_settings(save, monkeypatch):
    """Their training script saves its settings, of a class that is a dict, beside the model."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, module)
    settings = module.CfgNode(LR=0.1, MODEL=module.CfgNode(NAME="swin"))
    settings.frozen = True
    path = save({"model": {"a": torch.ones(2)}, "config": settings})
    monkeypatch.undo()
    arrays, beside = read_pytorch(path)
    assert list(arrays) == ["a"] and beside == ["config"]


def test_what_else_is_harmless(save):
    """Settings under a wrapper's name, parameters with attributes, buffers by themselves."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "frozen"
    content = {
        "model": argparse.Namespace(name="swin"),
        "state_dict": {"a": parameter, "b": torch.nn.Buffer(torch.zeros(3))},
    }
    arrays, beside = read_pytorch(save(content))
    assert list(arrays) == ["a", "b"] and beside == ["model"]
    np.testing.assert_array_equal(arrays["a"], np.ones(2))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_wrappings(save, wrapper):
    content = {wrapper: {"state_dict": {"a": torch.ones(2), "note": "text"}}, "model_ema": {}}
    arrays, beside = read_pytorch(save(content))
    assert list(arrays) == ["a"] and beside == ["note", "model_ema"]


class Calls:
    """Pickled, it is a call of `function` with `argument`."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["model", "state", "args", "plain", "bare"])
@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.getattr, torch.load])
def test_code_is_refused_and_not_run(save, tmp_path, function, place):
    marker = tmp_path / "marker"
    text = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w').close()"
    evil, good = Calls(function, text), {"a": torch.ones(2)}
    if place == "bare":
        (tmp_path / "file.pth").write_bytes(pickle.dumps(evil))
        path = tmp_path / "file.pth"
    else:
        path = save(
            {
                "model": {"model": evil},
                "state": {"model": {**good, "b": evil}},
                "args": {"model": good, "args": argparse.Namespace(nested=[{"x": evil}])},
                "plain": evil,
            }[place]
        )
    names = rf"(posix|nt|builtins|__builtin__|torch\.serialization)\.{function.__name__}"
    with pytest.raises(UserError, match=rf"file\.pth names {names}, which is code") as error:
        read_pytorch(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    # The same file does run it where it is trusted, so the test can fail.
    if place == "bare" and function is os.system:
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_whole_models_are_refused(save):
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_pytorch(save(torch.nn.Linear(2, 3)))


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"model": 3}, {}, {"a": 1}, torch.ones(2), {"model": {"a": "b"}}]
)
def test_without_arrays_by_name(save, content):
    with pytest.raises(UserError, match="cannot be read as a PyTorch file.*it holds"):
        read_pytorch(save(content))


def test_a_wrapping_that_is_not_known_is_named(save):
    with pytest.raises(UserError, match="no arrays by name, but teacher, epoch; .*model or state"):
        read_pytorch(save({"teacher": {"a": torch.ones(2)}, "epoch": 3}))


def test_cut_short(save, tmp_path):
    whole = save({"model": {str(i): torch.ones(50) for i in range(4)}}).read_bytes()
    cut = tmp_path / "cut.pth"
    for size in (1, 10, 60, 300, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged, cut short"):
            read_pytorch(cut)


def test_flipped_bits_never_end_otherwise_than_in_one_error(save):
    path = save({"model": {"a": torch.arange(40.0), "b": torch.ones(3, 5)}, "epoch": 2})
    whole = bytearray(path.read_bytes())
    expected = read_pytorch(path)[0]
    archive = whole.startswith(b"PK")
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(whole), 400, replace=False):
        damaged = whole.copy()
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            arrays, _ = read_pytorch(path)
        except UserError:
            refused += 1
            continue
        if archive:  # It has checksums; what is left are flips in padding and in unused fields.
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert refused > 40


def test_impossible_layouts(tmp_path):
    """Sizes and strides that reach beyond the storage, as no PyTorch would write them."""

    class Tensor:
        def __init__(self, *layout):
            self.layout = layout

        def __reduce__(self):
            storage = torch.ones(6)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, *self.layout, False, {})

    for layout in (
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 2), (5, 2)),
        (0, (10**12,), (0,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), ()),
        (0, ("2",), (1,)),
    ):
        torch.save({"a": Tensor(*layout)}, tmp_path / "file.pth")
        with pytest.raises(UserError, match="a (is larger than its storage|has an impossible)"):
            read_pytorch(tmp_path / "file.pth")


def test_numbers_that_count_with_the_other_sign_are_refused(save):
    """PyTorch marks them so instead of turning them; no checkpoint has any."""
    path = save({"a": torch._neg_view(torch.ones(3))})
    assert torch.load(path)["a"].tolist() == [-1] * 3
    with pytest.raises(UserError, match="marked {'neg': True}"):
        read_pytorch(path)


def test_a_small_file_is_not_read_as_many_large_ones(tmp_path):
    """Two members of a zip archive that lie in the same place."""
    torch.save({"a": torch.ones(50_000), "b": torch.zeros(5)}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth", "a") as archive:
        (large,) = (i for i in archive.infolist() if i.file_size == 200_000)
        twin = copy.copy(large)
        twin.filename = large.filename[:-1] + "7"
        archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(UserError, match="overlap"):
        read_pytorch(tmp_path / "file.pth")


def test_other_zip_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def write(changed, **kwargs):
        with zipfile.ZipFile(tmp_path / "file.pth", "w", **kwargs) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        return tmp_path / "file.pth"

    assert list(read_pytorch(write(members))[0]) == ["a"]
    storage = next(name for name in members if name.endswith("/data/0"))
    order = next(name for name in members if name.endswith("/byteorder"))
    for changed, message, kwargs in (
        ({"words.txt": b""}, "not one of torch.save", {}),
        ({**members, order: b"big"}, "big-endian", {}),
        ({**members, storage: b"1234"}, "storage 0 of a is not whole", {}),
        ({n: c for n, c in members.items() if n != storage}, "There is no item named", {}),
        (members, "compressed", {"compression": zipfile.ZIP_DEFLATED}),
    ):
        with pytest.raises(UserError, match=message):
            read_pytorch(write(changed, **kwargs))


# TorchScript.


class Scripted(torch.nn.Module):
    """Modules in modules, a buffer, half precision, tied weights, and attributes of many kinds."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        self.positions = torch.nn.Parameter(torch.randn(5, 3).half())
        self.tied = self.head[0].weight
        self.register_buffer("input_resolution", torch.tensor(224))
        self.count, self.names, self.sizes, self.nothing = 3, ["a", "b"], [1, 2], None

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3))) @ self.tied


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_what_state_dict_would(tmp_path, how):
    module = Scripted().eval()
    path = tmp_path / "model.pt"
    if how == "script":
        torch.jit.script(module).save(path)
    else:
        torch.jit.trace(module, torch.ones(1, 3, 8, 8)).save(path)
    arrays, beside = read_pytorch(path)
    expected = module.state_dict()
    assert arrays.keys() == expected.keys() and beside == []
    for name, tensor in expected.items():
        assert str(tensor.dtype) == f"torch.{arrays[name].dtype}"
        np.testing.assert_array_equal(arrays[name], tensor)


def rewritten(path: pathlib.Path, content: bytes) -> pathlib.Path:
    """The archive with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith("/data.pkl") else old)
    return path


def scripted(*state: bytes) -> bytes:
    """A pickle of one object of a class __torch__.M with a state of these opcodes."""
    return b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01" + b"".join(state) + b"b."


def test_what_the_authors_scripts_save_beside_the_arrays(save):
    """CRIS's its schedule, CrossVLT's its best score, a tensor; others NumPy's arrays, dtypes."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35], 0.1)
    content = {
        "epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(), "best_oIoU": torch.tensor(61.5),
        "curve": np.arange(3.0), "dtype": torch.float32,
        "more": [torch.int32, torch.bool, torch.strided, datetime.datetime(2026, 1, 2),
                 datetime.timedelta(1), types.SimpleNamespace(a=1), pathlib.PurePosixPath("a")],
    }  # fmt: skip
    arrays, beside = read_pytorch(save(content))
    assert list(arrays) == ["weight", "bias"]
    assert beside == ["epoch", "optimizer", "scheduler", "best_oIoU", "curve", "dtype", "more"]


MAKE = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "build",
    [
        b"2\x86" * 60,  # Each a pair of the last one.
        b"\x85" * 20_000,  # Each holds the last one: its hash overflows the stack.
        b"q\x00(" + b"h\x00" * 999 + b"tq\x01(" + b"h\x01" * 999 + b"t",  # A million values.
        b"".join((b"q\x000", *[b"(" + MAKE + b"h\x00" * 4 + b"oq\x000"] * 12, b"h\x00")),
    ],
)
def test_tuples_that_take_for_ever_are_refused(tmp_path, build):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02})" + build + b"K\x01s.")
    with pytest.raises(UserError, match="tuples within tuples"):
        read_pytorch(tmp_path / "model.pth")


def test_a_number_in_a_pickle_takes_no_memory(tmp_path):
    """The unpickler in C makes room for so many values as the largest number of one says."""
    (tmp_path / "model.pth").write_bytes(b"\x80\x02Nr" + (30_000_000).to_bytes(4, "little") + b".")
    tracemalloc.start()
    with pytest.raises(UserError, match="cannot be read"):
        read_pytorch(tmp_path / "model.pth")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_hostile_torchscript(tmp_path):
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    torch.jit.script(Scripted().eval()).save(path)
    call = b"cos\nsystem\n(Vtouch " + str(marker).encode() + b"\ntR"
    for state, message in (
        (b"}Vx\n" + call + b"s", r"names os\.system, which is code"),
        (b"}Vx\nc__torch__.os\nsystem\n(V1\ntRs", "cannot be read"),
        (b"}Vx\nh\x01s", "in two places"),  # It holds itself.
        (b"K\x05", "cannot be read"),  # No attributes.
        (b"}Vx\nh\x00s", "it holds no arrays by name"),  # A class.
    ):
        with pytest.raises(UserError, match=message):
            read_pytorch(rewritten(path, scripted(state)))
        assert not marker.exists()
    pickle.loads(b"\x80\x02" + call + b".")
    assert marker.exists()  # So the test can fail.
