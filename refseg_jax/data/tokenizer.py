"""Text to token ids: BERT's WordPiece, from a grammar's words, a file or a model's name."""

import functools
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from refseg_jax.errors import UserError

FILE_NAME = "tokenizer.json"
_PAD, _UNK, _CLS, _SEP, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_PUNCTUATION = ".,;:!?'\"()-/&"


class Tokenizer:
    """A lower-casing WordPiece tokenizer: [CLS] pieces [SEP], padded with [PAD]."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps a `tokenizers.Tokenizer`; raises UserError if it lacks [PAD], [CLS] or [SEP]."""
        missing = [name for name in (_PAD, _CLS, _SEP) if backend.token_to_id(name) is None]
        if missing:
            raise UserError(
                f"tokenizer without {', '.join(missing)}: a BERT-style WordPiece vocabulary is "
                "needed, for example bert-base-uncased"
            )
        # Length is ours to handle, so that a cut can be counted and reported.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.pad_id: int = backend.token_to_id(_PAD)
        self._sep_id: int = backend.token_to_id(_SEP)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def _encode(self, text: str) -> tokenizers.Encoding:
        encoding = self._backend.encode(text)
        if all(encoding.special_tokens_mask):
            raise UserError("empty expression: give at least one word to look for")
        return encoding

    def encode(self, text: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Ids int32 [max_tokens], mask bool [max_tokens] (True: real token), and whether cut.

        A text that is too long loses its last pieces and keeps [SEP]. Raises UserError when the
        text is blank, ValueError when `max_tokens` leaves no room for a piece.
        """
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens}: [CLS], one piece and [SEP] need 3")
        found = self._encode(text).ids
        truncated = len(found) > max_tokens
        if truncated:
            found = [*found[: max_tokens - 1], self._sep_id]
        ids = np.full(max_tokens, self.pad_id, np.int32)
        ids[: len(found)] = found
        return ids, np.arange(max_tokens) < len(found), truncated

    def tokens(self, text: str) -> list[str]:
        """The pieces as strings, with [CLS] and [SEP], not truncated; UserError when blank."""
        return self._encode(text).tokens

    def save(self, path: str | pathlib.Path) -> None:
        """Writes one JSON file; `path` is the file, or a folder in which it gets `FILE_NAME`."""
        path = pathlib.Path(path)
        self._backend.save(str(path / FILE_NAME if path.is_dir() else path))

    def __reduce__(self):
        return _from_json, (self._backend.to_str(),)

    @classmethod
    def load(cls, name: str | pathlib.Path) -> "Tokenizer":
        """Loads a tokenizer.json, a folder with one or with vocab.txt, a vocab.txt, or a HF name.

        Raises UserError when the file is not a tokenizer or the name is not known.
        """
        path = pathlib.Path(name)
        if path.is_dir():
            files = [path / FILE_NAME, path / "vocab.txt"]
            path = next((file for file in files if file.is_file()), None)
            if path is None:
                raise UserError(f"no {FILE_NAME} and no vocab.txt in {name}")
        try:
            if path.name == "vocab.txt" and path.is_file():
                return cls(_bert(path.read_text(encoding="utf-8").splitlines()))
            if path.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(path)))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from error
        import transformers  # slow to import, and only names need it

        try:
            return cls(transformers.AutoTokenizer.from_pretrained(str(name)).backend_tokenizer)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"no tokenizer {name!r}: neither a file or folder here nor a model that Hugging "
                f"Face can give ({str(error).splitlines()[0]})"
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


@functools.cache
def _from_json(text: str) -> Tokenizer:
    """For unpickling: workers that get the same tokenizer share one."""
    return Tokenizer(tokenizers.Tokenizer.from_str(text))
