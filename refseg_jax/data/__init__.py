"""Datasets, tokenisers and batches."""

from typing import Any

from refseg_jax.data.records import Source
from refseg_jax.data.tokenizer import Tokenizer


def open_source(config: Any, split: str) -> Source:
    """One split of the dataset that `config` (`config.data`) names: drawn, raw, prepared or merged.

    Raises:
      UserError: no such dataset or split, or files that are missing or damaged.
    """
    if config.dataset == "shapes":
        from refseg_jax.data.shapes import ShapesSource

        return ShapesSource(
            split, num_scenes=config.shapes_scenes.get(split), size=config.image_size
        )
    from refseg_jax.data import sets

    if config.dataset == sets.MERGED:
        return sets.open_merged(config.root, config.merged, split)
    return sets.open_set(config.root, sets.set_name(config.dataset, config.split_by), [split])[
        split
    ]


def load_tokenizer(name: str) -> Tokenizer:
    """The embedded grammar's own ("shapes"), a tokenizer file or directory, or a hub name.

    Raises:
      UserError: there is none of that name.
    """
    if name == "shapes":
        from refseg_jax.data import shapes

        return shapes.tokenizer()
    return Tokenizer.load(name)


__all__ = ["Source", "Tokenizer", "load_tokenizer", "open_source"]
