"""What every dataset looks like to the rest of the house: refs, their sentences, and a source."""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One expression. `kind` is its type (attribute, place, ...) where the data knows it."""

    text: str
    sent_id: int
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Ref:
    """One referred region of one image, with all its expressions."""

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    category: str
    split: str
    sentences: tuple[Sentence, ...]


class Source(Protocol):
    """One split of one dataset, with random access.

    Sentences are numbered 0 .. num_sentences - 1 in ref order; `locate` maps such a number to
    (ref index, index of the sentence within the ref).
    """

    name: str
    split: str
    num_sentences: int

    def __len__(self) -> int:
        """Number of refs."""

    def __getitem__(self, i: int) -> Ref: ...

    def locate(self, j: int) -> tuple[int, int]: ...

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB, upright."""

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W], at the image's own size."""
