"""Text to token ids, from a grammar's words, a file or a model's name: WordPiece, CLIP's BPE."""

import functools
import gzip
import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from refseg_jax.data.files import write_whole
from refseg_jax.errors import UserError

FILE_NAME = "tokenizer.json"
_PAD, _UNK, _CLS, _SEP, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = ".,;:!?'\"()-/&"


class Tokenizer:
    """A lower-casing tokenizer: mark, pieces, mark, padding.

    The marks are BERT's [CLS] and [SEP], padded with [PAD], or CLIP's <|startoftext|> and
    <|endoftext|>, padded with id 0 as CLIP's code does: CLIP has no token for it.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps a `tokenizers.Tokenizer`; raises UserError if it lacks the marks or [PAD]."""
        clip = all(backend.token_to_id(name) is not None for name in (_START, _END))
        missing = [name for name in (_PAD, _CLS, _SEP) if backend.token_to_id(name) is None]
        if missing and not clip:
            raise UserError(
                f"tokenizer without {', '.join(missing)}: a BERT-style WordPiece vocabulary or "
                "CLIP's is needed, for example bert-base-uncased, openai/clip-vit-base-patch32"
            )
        # Length is ours to handle, so that a cut can be counted and reported.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.pad_id: int = 0 if clip else backend.token_to_id(_PAD)
        self._end_id: int = backend.token_to_id(_END if clip else _SEP)

    @property
    def vocab_size(self) -> int:
        """Rows that its ids need: of a vocabulary that has an entry twice, more than entries."""
        return max(self._backend.get_vocab().values()) + 1

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            encoding = self._backend.encode(text)
        except TypeError:  # The library takes what UTF-8 can spell.
            raise UserError(f"the expression {text!r} is no valid Unicode") from None
        if all(encoding.special_tokens_mask):
            raise UserError("empty expression: give at least one word to look for")
        return encoding

    def encode(self, text: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Ids int32 [max_tokens], mask bool [max_tokens] (True: real token), and whether cut.

        A text that is too long loses its last pieces and keeps the end mark. Raises UserError when
        the text is blank, ValueError when `max_tokens` leaves no room for a piece.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}: two marks and one piece need 3")
        found = self._encode(text).ids
        truncated = len(found) > max_tokens
        if truncated:
            found = [*found[: max_tokens - 1], self._end_id]
        ids = np.full(max_tokens, self.pad_id, np.int32)
        ids[: len(found)] = found
        return ids, np.arange(max_tokens) < len(found), truncated

    def tokens(self, text: str) -> list[str]:
        """The pieces as strings, with the marks, not truncated; UserError when blank."""
        return self._encode(text).tokens

    def unknown(self, text: str, max_tokens: int) -> tuple[str, ...]:
        """The words that `encode` keeps of a text and has no piece for but [UNK], each once."""
        encoding, unknown_id = self._encode(text), self._backend.token_to_id(_UNK)
        places = list(zip(encoding.ids, encoding.offsets, strict=True))[: max_tokens - 1]
        return tuple(dict.fromkeys(text[slice(*place)] for i, place in places if i == unknown_id))

    def digest(self) -> str:
        """A hash of all that it does."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """What `save` writes."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes one JSON file; `path` is the file, or a folder in which it gets `FILE_NAME`."""
        path = epath.Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        write_whole(path, self.text())

    def __reduce__(self):
        return _from_json, (self._backend.to_str(),)

    @classmethod
    def load(cls, name: str | pathlib.Path) -> "Tokenizer":
        """Loads a tokenizer.json, BERT's vocab.txt, CLIP's vocab.json, or what a HF name gives.

        Beside vocab.json lies merges.txt. A folder may stand for the file in it; CLIP's own
        bpe_simple_vocab_16e6.txt.gz is read too. Raises UserError when the file is not a tokenizer
        or the name is not known.
        """
        path = epath.Path(name)
        if path.is_dir():
            files = [path / file for file in (FILE_NAME, "vocab.txt", "vocab.json")]
            path = next((file for file in files if file.is_file()), None)
            if path is None:
                raise UserError(f"no {FILE_NAME} and no vocab.txt or vocab.json in {name}")
        try:
            if path.is_file():
                return cls(_from_file(path))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from error
        if path.suffix in (".json", ".txt", ".gz") or path.is_absolute():  # No name of a model.
            raise UserError(f"no tokenizer at {name}: there is no such file or folder")
        import transformers  # slow to import, and only names need it

        load = transformers.AutoTokenizer.from_pretrained
        try:
            # What was fetched once is not asked for again: without a connection that takes minutes.
            try:
                found = load(str(name), local_files_only=True)
            except (OSError, ValueError):
                found = load(str(name))
            return cls(found.backend_tokenizer)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"no tokenizer {str(name)!r}: neither a file or folder here nor a model that "
                f"Hugging Face can give ({str(error).splitlines()[0]}): where there is no "
                f"connection give a folder with its {FILE_NAME} or vocab.txt"
            ) from error

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Tokenizer":
        """A vocabulary of these words; any other is spelled in single characters.

        The ids depend on the set of words only, not on their order.
        """
        whole = set(words) | set(_CHARACTERS) | set(_PUNCTUATION)
        pieces = [f"##{character}" for character in _CHARACTERS]
        return cls(_bert([_PAD, _UNK, _CLS, _SEP, _MASK, *sorted(whole), *pieces]))


def _bert(vocabulary: list[str]) -> tokenizers.Tokenizer:
    """BERT's uncased tokenizer over a vocabulary in the order of its ids."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=_UNK))
    backend.add_special_tokens([name for name in (_PAD, _UNK, _CLS, _SEP, _MASK) if name in ids])
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    if _CLS in ids and _SEP in ids:
        backend.post_processor = processors.BertProcessing((_SEP, ids[_SEP]), (_CLS, ids[_CLS]))
    return backend


def _from_file(path: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer of a file, by its name; whatever is raised, it is none."""
    if path.name == "vocab.txt":
        # Not `splitlines`: vocabularies have other line separators as tokens.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return _bert(lines)
    if path.name == "vocab.json":
        merges = _pairs(path.with_name("merges.txt").read_text(encoding="utf-8"))
        return _clip(json.loads(path.read_text(encoding="utf-8")), merges)
    if path.name.endswith(".txt.gz"):
        merges = _pairs(gzip.decompress(path.read_bytes()).decode("utf-8"))
        # CLIP has 49408 entries: 256 bytes, with and without an end, its merges, two marks.
        merges = merges[: 49408 - 2 * 256 - 2]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        ends = [f"{character}</w>" for character in alphabet]
        pieces = [*alphabet, *ends, *map("".join, merges), _START, _END]
        return _clip({piece: i for i, piece in enumerate(pieces)}, merges)
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _pairs(text: str) -> list[tuple[str, ...]]:
    """The merges of a file: a line of version, then two pieces a line, the most frequent first."""
    return [tuple(line.split()) for line in text.split("\n")[1:] if line]


def _clip(ids: dict[str, int], merges: list[tuple[str, ...]]) -> tokenizers.Tokenizer:
    """CLIP's lower-casing BPE over a vocabulary."""
    import transformers  # slow to import

    return transformers.CLIPTokenizer(vocab=ids, merges=merges).backend_tokenizer


@functools.cache
def _from_json(text: str) -> Tokenizer:
    """For unpickling: workers that get the same tokenizer share one."""
    return Tokenizer(tokenizers.Tokenizer.from_str(text))
