"""Finding and reading checkpoints of every kind, and what is said of what is none."""

import json
import os
import re
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from refseg_jax.errors import UserError
from refseg_jax.weights.files import read_checkpoint
from tests.conftest import REPO

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
TENSORS = {name: torch.from_numpy(array) for name, array in STATE.items()}


def check(checkpoint):
    assert checkpoint.arrays.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], array, strict=True)


def test_formats_are_told_by_content(tmp_path):
    for name in ("a.safetensors", "a.bin", "a"):
        safetensors.numpy.save_file(STATE, tmp_path / name)
        check(read_checkpoint(tmp_path / name))
    for name in ("b.pth", "b.bin", "b"):
        torch.save({"model": TENSORS, "epoch": 1}, tmp_path / name)
        check(found := read_checkpoint(str(tmp_path / name)))
        assert found.path == tmp_path / name and found.beside == ["epoch"]


def test_safetensors_in_bfloat16(tmp_path):
    safetensors.torch.save_file({"a": torch.tensor([1.5, -2]).bfloat16()}, tmp_path / "a")
    array = read_checkpoint(tmp_path / "a").arrays["a"]
    np.testing.assert_array_equal(array.astype(np.float32), [1.5, -2])


def test_directories(tmp_path):
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        read_checkpoint(tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    check(read_checkpoint(tmp_path))
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_checkpoint(tmp_path).arrays) == ["a"]


@pytest.mark.parametrize("format", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, format):
    for i, (name, tensor) in enumerate(TENSORS.items()):
        save = safetensors.torch.save_file if "safe" in format else torch.save
        save({name: tensor}, tmp_path / f"part{i}")
    index = tmp_path / f"{format}.index.json"
    places = {name: f"part{i}" for i, name in enumerate(TENSORS)}

    def write(places):
        index.write_text(json.dumps({"weight_map": places}))

    write(places)
    check(read_checkpoint(tmp_path))
    check(read_checkpoint(index))
    for wrong, message in (
        ({**places, "c": "part0"}, "does not fit its files .c."),
        ({"a.weight": "part1", "b": "part1"}, "does not fit its files"),
        ({**places, "b": "part7"}, "no checkpoint at .*part7"),
        ({**places, "b": "../part1"}, "another directory: ../part1"),
        ({**places, "b": "part\0"}, "another directory"),
        ({**places, "b": index.name}, "no checkpoint of a kind"),
        (["part0"], "not an index"),
    ):
        write(wrong)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not an index"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><head><title>Google Drive", "is a web page.*Google Drive"),
        (b"\n <html>", "is a web page"),
        (b"just some words, on a line of their own", "no checkpoint of a kind|not a whole"),
        (b"PK\x03\x04" + bytes(200), "damaged, cut short|not a whole"),
        (b"\x80\x04" + bytes(200), "damaged, cut short|not a whole"),
        (b"cposix\nsystem\n(S'true'\ntR.", "no checkpoint of a kind|not a whole"),
        (b"\x10" + bytes(7) + b'{"a": oops}     ', "not a whole safetensors file"),
    ],
)
@pytest.mark.parametrize("name", ["file.pth", "model.safetensors", "file"])
def test_what_is_no_checkpoint(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(STATE, path)
    whole = path.read_bytes()
    for size in (1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_checkpoint(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(header):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:  # Still whole where a flip only renames an array, which conversion then refuses.
            assert read_checkpoint(path).arrays.keys() != STATE.keys()
        except UserError:
            refused += 1
    assert refused > header / 2
    safetensors.torch.save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="float8"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "place", ["absent.pth", "some/absent.safetensors", "/a/b", "a/b/c", "..", "x" * 300]
)
def test_missing_files_are_not_looked_for_elsewhere(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pytest.fail)
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(place)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TENSORS, tmp_path / "cached")
    asked = []

    def download(name, file):
        asked.append((name, file))
        if file == "model.safetensors":
            raise huggingface_hub.errors.EntryNotFoundError("404\nThere is no such file")
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("bert-base-uncased", "microsoft/swin-base-patch4-window12-384-in22k"):
        asked.clear()
        check(read_checkpoint(name))
        assert asked == [(name, "model.safetensors"), (name, "pytorch_model.bin")]
        read_checkpoint(name, beside=("config.json",))
        assert asked[-1] == (name, "config.json")
    (tmp_path / "bert-base-uncased").mkdir()  # What lies here comes first.
    safetensors.numpy.save_file(STATE, tmp_path / "bert-base-uncased" / "model.safetensors")
    asked.clear()
    check(read_checkpoint("bert-base-uncased"))
    assert not asked


def test_shards_of_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, tensor in TENSORS.items():
        safetensors.torch.save_file({name: tensor}, cache / f"{name}.safetensors")
    places = {name: f"{name}.safetensors" for name in TENSORS}
    (cache / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    asked = []

    def download(name, file):
        asked.append(file)
        if not (cache / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(cache / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check(read_checkpoint("some/large-model"))
    assert set(places.values()) <= set(asked)


def test_where_nobody_answers_it_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(TENSORS, tmp_path / "cached")
    asked = []

    def download(name, file, local_files_only=False):
        asked.append(local_files_only)
        if file != "pytorch_model.bin":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    check(read_checkpoint("some/model"))
    assert asked == [False, True]


def test_without_a_connection(tmp_path):
    """In a process of its own, in which nothing else has imported the hub's library."""
    program = "from refseg_jax.weights.files import read_checkpoint; read_checkpoint('some/model')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    expected = r"UserError: some/model is neither a file .*model.safetensors: .*path\n$"
    assert done.returncode == 1 and re.search(expected, done.stderr), done.stderr
