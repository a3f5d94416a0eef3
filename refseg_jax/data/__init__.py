"""Datasets, tokenisers and batches."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from refseg_jax.data.records import Source
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError


def open_sources(config: Any, splits: Iterable[str]) -> dict[str, Source]:
    """Splits of the dataset that `config` (`config.data`) names: drawn, raw, prepared or merged.

    Raises:
      UserError: no such dataset or split, or files that are missing or damaged.
    """
    splits = list(dict.fromkeys(splits))
    if config.dataset == "shapes":
        from refseg_jax.data.shapes import ShapesSource

        scenes, size = config.shapes_scenes, config.image_size
        return {s: ShapesSource(s, num_scenes=scenes.get(s), size=size) for s in splits}
    from refseg_jax.data import sets

    text_field = config.get("text_field", "raw")  # Runs of earlier versions have none.
    try:
        if config.dataset == sets.MERGED:
            return {s: sets.open_merged(config.root, config.merged, s, text_field) for s in splits}
        name = sets.set_name(config.dataset, config.split_by)
        return sets.open_set(config.root, name, splits, text_field=text_field)
    except UserError as error:
        raise UserError(f"config.data.root={config.root}: {error}") from error


def open_source(config: Any, split: str) -> Source:
    """One of `open_sources`."""
    return open_sources(config, [split])[split]


def absolute_root(config: Any) -> str:
    """Where `config` (`config.data`) says that the data lies, from wherever it is read."""
    return config.root if "://" in config.root else os.path.abspath(config.root)


def identity(source: Source) -> dict[str, Any]:
    """What a split is, wherever it lies, raw or prepared: its numbers and a hash of its texts."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        ref = source[i]
        said = [(sentence.sent_id, sentence.text) for sentence in ref.sentences]
        digest.update(repr((ref.ref_id, ref.image_id, ref.ann_ids, said)).encode())
    counts = {"refs": len(source), "sentences": source.num_sentences}
    return {"dataset": source.name, **counts, "sha256": digest.hexdigest()}


def load_tokenizer(name: str) -> Tokenizer:
    """The embedded grammar's own ("shapes"), a tokenizer file or directory, or a hub name.

    Raises:
      UserError: there is none of that name.
    """
    if name == "shapes":
        from refseg_jax.data import shapes

        return shapes.tokenizer()
    return Tokenizer.load(name)


__all__ = [
    *("Source", "Tokenizer", "absolute_root", "identity"),
    *("load_tokenizer", "open_source", "open_sources"),
]
