"""Batches: every one is a pure function of the seed and its number, so a run resumes exactly.

A batch is a dict of NumPy arrays (B = this process's rows of the global batch, S = image size):

    image       uint8 [B, S, S, 3]   not normalised: that happens on the device; it is stretched to
                                     the square, or with `letterbox` keeps its shape
    mask        bool  [B, S, S]
    tokens      int32 [B, T]
    token_mask  bool  [B, T]         True = a real token
    valid       bool  [B]            False = a padding row (all zero, tokens all padding)
    index       int32 [B]            number of the sentence in the source, -1 for padding

Input workers import this file: nothing in it may touch JAX (Grain imports JAX, which by itself
starts no device).
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from refseg_jax.data.records import Ref, Source
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.data.transforms import read_resized, resize_image, resize_mask
from refseg_jax.data.workers import born_deaf, end_with_parent
from refseg_jax.errors import UserError

Batch = dict[str, np.ndarray]

SAMPLINGS = ("sentence", "ref")


class CannotShuffle(UserError):
    """No sentence can be given to another ref than its own: there are too few."""


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What training and evaluation share: which rows are this process's, and loading them.

    Global batch k has `batch_size` rows; process p of P loads the p-th of P equal runs of them.
    """

    source: Source
    tokenizer: Tokenizer
    _: dataclasses.KW_ONLY
    image_size: int
    max_tokens: int
    batch_size: int
    letterbox: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.batch_size % self.process_count:
            raise UserError(
                f"batch size {self.batch_size} cannot be split evenly over {self.process_count} "
                "processes: make it a multiple"
            )

    def _rows(self, k: int) -> range:
        """Numbers, counted over all batches and processes, of this process's rows of batch k."""
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        rows = self.batch_size // self.process_count
        first = k * self.batch_size + self.process_index * rows
        return range(first, first + rows)

    def _picture(self, ref: Ref) -> np.ndarray:
        """uint8 [S, S, 3]; straight from the encoded picture where the source has it."""
        source, square = self.source, (self.image_size, self.letterbox)
        if hasattr(source, "image_bytes"):
            file = source.image_file(ref)
            found = read_resized(source.image_bytes(ref), (file.height, file.width), *square)
            if found is not None:
                return found
        return resize_image(source.image(ref), *square)

    def _mask(self, ref: Ref) -> np.ndarray:
        """bool [S, S]"""
        return resize_mask(self.source.mask(ref), self.image_size, self.letterbox)

    def _load(self, sentences: Sequence[int], texts: Sequence[int]) -> Batch:
        """Image and mask of `sentences`, words of `texts` (sentence numbers); -1 pads."""
        rows, size = len(sentences), self.image_size
        batch = {
            "image": np.zeros((rows, size, size, 3), np.uint8),
            "mask": np.zeros((rows, size, size), bool),
            "tokens": np.full((rows, self.max_tokens), self.tokenizer.pad_id, np.int32),
            "token_mask": np.zeros((rows, self.max_tokens), bool),
            "valid": np.array(sentences) >= 0,
            "index": np.array(sentences, np.int32),
        }
        # First rows of a picture, and of a ref: what sentences share is read once.
        pictures: dict[Any, int] = {}
        refs: dict[int, int] = {}
        for row in np.flatnonzero(batch["valid"]):
            i, _ = self.source.locate(sentences[row])
            text_ref, which = self.source.locate(texts[row])
            said = self.source[text_ref].sentences[which]
            ref, images, masks = self.source[i], batch["image"], batch["mask"]
            place = self.source.image_place(ref) if hasattr(self.source, "image_place") else i
            seen = pictures.setdefault(place, row)
            images[row] = self._picture(ref) if seen == row else images[seen]
            seen = refs.setdefault(i, row)
            masks[row] = self._mask(ref) if seen == row else masks[seen]
            try:
                encoded = _encode(self.tokenizer, said.text, self.max_tokens)
            except UserError as error:
                where = f"{self.source.name} {self.source.split}, sentence {said.sent_id}"
                raise UserError(f"{where}, {said.text!r}: {error}") from error
            batch["tokens"][row], batch["token_mask"][row], _ = encoded
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBatches(_Batches):
    """`num_steps` training batches, by step, running on across the ends of epochs.

    An epoch is a fresh permutation of all (ref, sentence) pairs (`sampling="sentence"`), or of
    all refs, each with one sentence drawn at random (`sampling="ref"`).
    """

    num_steps: int
    seed: int
    sampling: str = "sentence"

    def __post_init__(self):
        super().__post_init__()
        if self.sampling not in SAMPLINGS:
            raise UserError(f"unknown sampling {self.sampling!r}; there is {', '.join(SAMPLINGS)}")

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step; see the module's docstring."""
        sentences = [self._sentence(row) for row in self._rows(step)]
        return self._load(sentences, sentences)

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every pair (or every ref) has been seen once."""
        return self.source.num_sentences if self.sampling == "sentence" else len(self.source)

    def _sentence(self, sample: int) -> int:
        """Sentence number of the run's `sample`-th training sample."""
        epoch, position = divmod(sample, self.samples_per_epoch)
        drawn = int(_permutation(self.seed, epoch, self.samples_per_epoch)[position])
        if self.sampling == "sentence":
            return drawn
        # 1 + position: a stream of its own, apart from the permutation's (seed, epoch).
        rng = np.random.default_rng((self.seed, epoch, 1 + position))
        return int(self._first_sentences[drawn] + rng.integers(len(self.source[drawn].sentences)))

    @functools.cached_property
    def _first_sentences(self) -> np.ndarray:
        """Number of the first sentence of every ref."""
        return np.flatnonzero(np.diff(_ref_indices(self.source), prepend=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalBatches(_Batches):
    """Every sentence of every ref, in order, the last batch padded; as many on every process.

    With a `limit` they are at most so many, evenly spread, whatever the batches are. With
    `shuffle_text_seed` every sample keeps its image and mask and is given the expression of a
    sample of another ref, each expression being used once: what a model scores then, it scores
    without language.
    """

    limit: int | None = None
    shuffle_text_seed: int | None = None

    @property
    def num_sentences(self) -> int:
        every = self.source.num_sentences
        return every if self.limit is None else min(self.limit, every)

    def __len__(self) -> int:
        return -(-self.num_sentences // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        """The k-th batch; see the module's docstring."""
        every, some = self.source.num_sentences, self.num_sentences
        sentences = [row * every // some if row < some else -1 for row in self._rows(k)]
        return self._load(sentences, [self._texts[j] for j in sentences])

    @functools.cached_property
    def _texts(self) -> Sequence[int]:
        """For every sentence number the one whose words are shown with it."""
        if self.shuffle_text_seed is None:
            return range(self.source.num_sentences)
        return _other_refs_sentences(_ref_indices(self.source), self.shuffle_text_seed).tolist()


def train_iterator(
    batches: grain.sources.RandomAccessDataSource,
    start_step: int = 0,
    *,
    workers: int = 0,
    threads: int = 4,
) -> Iterator[Batch]:
    """Yields batches[start_step], batches[start_step + 1], ... loaded ahead in the background.

    The batches do not depend on `workers` (processes; 0: this one) nor on `threads` (batches being
    loaded at once in each of them; 0: none ahead). Evaluation batches can be iterated just so. An
    error met while loading is raised here with its own type and message.
    """
    if start_step >= len(batches):
        return
    if workers and not flags.FLAGS.is_parsed():
        # Grain hands absl's flags to its workers; a notebook or a test has parsed none.
        flags.FLAGS.mark_as_parsed()
    dataset = (
        grain.MapDataset.source(batches)[start_step:]
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers),
            worker_init_fn=end_with_parent if workers else None,
        )
    )
    with contextlib.ExitStack() as stack:
        if workers:
            stack.callback(gc.collect)  # Lets go of batches in shared memory.
        with born_deaf() if workers else contextlib.nullcontext():
            iterator = iter(dataset)
            stack.callback(iterator.close)
            first = next(iterator)
        yield first
        yield from iterator


def count_truncated(
    source: Source, tokenizer: Tokenizer, max_tokens: int, limit: int | None = None
) -> int:
    """How many of the (first `limit`) sentences do not fit into `max_tokens` tokens."""
    refs = (source[i] for i in range(len(source)))
    texts = (sentence.text for ref in refs for sentence in ref.sentences)
    return sum(_encode(tokenizer, text, max_tokens)[2] for text in itertools.islice(texts, limit))


# Expressions repeat over epochs and among refs: 2^18 holds the largest training set.
@functools.lru_cache(maxsize=1 << 18)
def _encode(
    tokenizer: Tokenizer, text: str, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    return tokenizer.encode(text, max_tokens)


# A batch spans at most a few epochs; the threads work near each other.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def _ref_indices(source: Source) -> np.ndarray:
    """int [num_sentences]: the index of every sentence's ref, never falling."""
    return np.array([source.locate(j)[0] for j in range(source.num_sentences)])


def _other_refs_sentences(refs: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of sentence numbers that gives none a sentence of its own ref.

    The refs are put in random order, their sentences staying together, and the row of sentences
    is turned by half its length: no ref reaches that far unless it has more than half of them.
    """
    if 2 * np.bincount(refs).max() > len(refs):
        raise CannotShuffle(
            "expressions cannot be shuffled among refs: one ref has more than half of them"
        )
    order = np.argsort(np.random.default_rng(seed).permutation(refs[-1] + 1)[refs], kind="stable")
    others = np.empty_like(order)
    others[order] = np.roll(order, len(order) // 2)
    return others
