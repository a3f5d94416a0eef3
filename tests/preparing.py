"""What the tests of prepared data share: small datasets on disk, and comparing two sources."""

import json
import pathlib

import numpy as np

from refseg_jax.data import prepare, shapes
from refseg_jax.data.refer import ReferFiles, ReferSource

SCENES = {"train": 4, "val": 2}


def write_shapes(root: pathlib.Path, size: int = 64) -> pathlib.Path:
    """The embedded data in the layout of RefCOCO: 6 images, 18 refs, 54 sentences."""
    shapes.write_refer(root, num_scenes=SCENES, size=size)
    return root


def refer_sources(root, dataset, split_by="unc", **options) -> dict[str, ReferSource]:
    files = ReferFiles(root, dataset, split_by)
    return {
        split: ReferSource(root, dataset, split_by, split, files=files, **options)
        for split in files.splits
    }


def run(*arguments) -> int:
    """The command line, in this process; its exit status."""
    return prepare.main([str(argument) for argument in arguments])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def assert_same_source(source, other) -> None:
    """Same refs, sentences, order, images and masks."""
    assert (source.name, source.split, len(source)) == (other.name, other.split, len(other))
    assert source.num_sentences == other.num_sentences
    for j in range(source.num_sentences):
        assert source.locate(j) == other.locate(j)
    for i in range(len(source)):
        ref = source[i]
        assert ref == other[i]
        assert source.image_file(ref) == other.image_file(ref)
        assert source.image_bytes(ref) == other.image_bytes(ref)
        np.testing.assert_array_equal(source.image(ref), other.image(ref))
        np.testing.assert_array_equal(source.mask(ref), other.mask(ref))
        assert source.mask(ref).dtype == other.mask(ref).dtype == bool
