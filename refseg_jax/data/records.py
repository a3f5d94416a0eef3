"""What every dataset looks like to the rest of the house: refs, their sentences, and a source."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
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
    """One referred region of one image, with all its expressions.

    `ann_ids` are the annotations whose union it is: usually one; none where the expressions
    describe something that the image does not show, and the mask is empty.
    """

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


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image as it is stored: its name in its dataset, and the size its masks are drawn at."""

    name: str
    height: int
    width: int


class FileSource(Source, Protocol):
    """A source whose images are files, so that it can be prepared and merged."""

    def image_file(self, ref: Ref) -> ImageFile: ...

    def image_bytes(self, ref: Ref) -> bytes:
        """The encoded picture."""

    def image_place(self, ref: Ref) -> str:
        """Where the picture is stored: refs of one place share it."""

    def origin(self, ref: Ref) -> str:
        """See RefList."""

    # See RefList.
    faults: tuple[str, ...]
    other_images: tuple[ImageFile, ...]


class RefList:
    """The part of `Source` that sources share which hold their refs in memory.

    Attributes:
      faults: a line for every ref that was left out because it could not be used.
      other_images: images of refs that were left out, which belong to the split all the same.
    """

    def __init__(
        self,
        name: str,
        split: str,
        refs: Sequence[Ref],
        faults: Sequence[str] = (),
        other_images: Iterable[ImageFile] = (),
    ):
        self.name, self.split = name, split
        self.faults, self.other_images = tuple(faults), tuple(dict.fromkeys(other_images))
        self._refs = tuple(refs)
        # Number of sentences of refs 0 .. i.
        self._ends = list(itertools.accumulate(len(ref.sentences) for ref in self._refs))
        self.num_sentences = self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, i: int) -> Ref:
        return self._refs[i]

    def origin(self, ref: Ref) -> str:
        """Where a ref was written down, in words; "" where its number says so."""
        return ""

    def locate(self, j: int) -> tuple[int, int]:
        """Sentence number -> (ref index, index of the sentence within the ref)."""
        if not 0 <= j < self.num_sentences:
            raise IndexError(f"sentence {j} of {self.num_sentences}")
        i = bisect.bisect_right(self._ends, j)
        return i, j - self._ends[i] + len(self._refs[i].sentences)
