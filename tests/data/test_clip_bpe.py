"""CLIP's vocabulary with BERT's splitting equals the original's tokenizer."""

import hashlib
import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers.implementations import CharBPETokenizer

from magma_jax.data.tokenizers import byte_level
from magma_jax.data.tokenizers.byte_level import byte_symbols, packaged_merges
from magma_jax.data.tokenizers.captions import CLEAN_UPS
from magma_jax.data.tokenizers.clip_bpe import LENGTH, clip_bpe

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/golden/magvlt/text_tokens.json").read_text("utf-8"))
ROWS = pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: repr(row["text"])[:20])
# Of the merges that CLIP uses, joined by newlines.
MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
CAPTION = "Eiffel tower photographed unbelievably, 1999 - naïve impressionists' perspective"


@pytest.fixture(scope="module")
def reference():
    """The library's tokenizer that the original uses, over the same vocabulary."""
    merges = packaged_merges("clip")
    symbols = byte_symbols()
    symbols = [*symbols, *(symbol + "</w>" for symbol in symbols), *(left + right for left, right in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CharBPETokenizer(vocabulary, merges, unk_token="[UNK]", lowercase=True)


def test_the_merges_are_the_published_ones():
    merges = Path(byte_level.__file__).parent / "clip" / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 48_894
    assert hashlib.sha256("\n".join(lines[1:]).encode()).hexdigest() == MERGES


def test_sizes():
    tokenizer = clip_bpe()
    assert len(tokenizer) == GOLDEN["vocab_size"] == 49_408
    assert tokenizer.eos_id == GOLDEN["eos_id"] == 49_407
    assert tokenizer.pad_id == GOLDEN["pad_id"]
    assert GOLDEN["context_length"] == LENGTH


@ROWS
@pytest.mark.parametrize("clean_up", ["none", "pre_caption"])
def test_ids_equal_the_originals(row, clean_up):
    expected = row["raw" if clean_up == "none" else clean_up]
    tokenizer = clip_bpe()
    text = tokenizer.encode_padded(CLEAN_UPS[clean_up](row["text"]))
    assert text.length == expected["n_true"]
    assert list(text.ids[: text.length]) == expected["ids"]
    assert text.ids[text.length :] == (tokenizer.pad_id,) * (LENGTH - text.length)
    assert tokenizer.decode(text.ids) == expected["decoded"].removesuffix(" ")


@ROWS
def test_clean_ups_equal_the_originals(row):
    assert CLEAN_UPS["pre_caption"](row["text"]) == row["pre_caption_text"]
    # The original fails on what has no word.
    expected = row["post_caption_text"].replace("!IndexError", "")
    assert CLEAN_UPS["post_caption"](row["text"]) == expected
    assert CLEAN_UPS["none"](row["text"]) == row["text"]


def test_both_clean_ups_of_generated_captions():
    text = "a man man <riding> a a wave. the the sea"
    assert CLEAN_UPS["post_caption"](text) == "a man riding a wave ."
    assert CLEAN_UPS["post_caption_eval"](text) == "a man man riding a a wave. the the sea"
    assert CLEAN_UPS["post_caption"](" . ") == ""


def test_any_text_equals_the_library(reference):
    """Random texts of letters, accents, digits, marks, white space and symbols of bytes."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzETAOIN" + "0123456789" + "éüñßø" + ".,'-_()#$%&/|<>" + "   \t\n\r\x00\x07"
    words = [symbol.removesuffix("</w>") for left, right in packaged_merges("clip")[::97] for symbol in (left, right)]
    for _ in range(300):
        text = "".join(rng.choice(letters) if rng.random() < 0.6 else rng.choice(words) for _ in range(30))
        try:
            expected = reference.encode(text).ids
        except Exception:  # what the library raises for unknown characters
            expected = reference.encode(text.encode("ascii", "ignore").decode()).ids
        assert clip_bpe().encode(text) == expected, repr(text)


def test_unknown_characters_cost_all_beyond_ascii(reference):
    for text in ("café — 日本 \U0001f600", "naïve\u200bfaçade ∑", "\u4e00", "x\u0301y"):
        with pytest.raises(Exception, match="not found"):
            reference.encode(text)
        assert clip_bpe().encode(text) == reference.encode(text.encode("ascii", "ignore").decode()).ids


def test_special_tokens_cannot_be_spelled():
    ids = clip_bpe().encode("a <|endoftext|> b <|startoftext|>")
    assert not {49_406, 49_407} & set(ids)


def test_long_texts_are_cut_or_refused():
    tokenizer = clip_bpe()
    for words, length in ((62, 63), (63, 64), (64, 64), (65, 64)):
        text = tokenizer.encode_padded(" ".join(["a"] * words))
        assert (len(text.ids), text.length) == (64, length)
        assert (tokenizer.eos_id in text.ids) == (words < 64)
    assert tokenizer.encode_padded("a " * 64, too_long="error").length == 64
    with pytest.raises(ValueError, match=r"the text has 65 tokens, more than 64: 'a a .*; shorten it"):
        tokenizer.encode_padded("a " * 65, too_long="error")
    assert tokenizer.encode_padded("red car", 4).length == 3


def test_dropout_is_seeded_and_keeps_the_text():
    tokenizer = clip_bpe()
    plain = tokenizer.encode(CAPTION)
    draws = [tokenizer.encode(CAPTION, dropout=0.1, rng=random.Random(seed)) for seed in range(40)]
    assert draws == [tokenizer.encode(CAPTION, dropout=0.1, rng=random.Random(seed)) for seed in range(40)]
    assert len({tuple(ids) for ids in draws}) > 10
    for ids in draws:
        assert tokenizer.decode(ids) == tokenizer.decode(plain)
    # Neither a rate of zero nor the draws before change the plain ids.
    assert tokenizer.encode(CAPTION, dropout=0.0, rng=random.Random(0)) == tokenizer.encode(CAPTION) == plain


def test_dropout_has_the_librarys_rate(reference):
    """Mean numbers of tokens over many draws; the library's own source of chance cannot be seeded."""
    dropping = tokenizers.Tokenizer.from_str(reference.to_str())
    dropping.model.dropout = 0.3
    theirs = [len(dropping.encode(CAPTION).ids) for _ in range(1000)]
    rng = random.Random(0)
    ours = [len(clip_bpe().encode(CAPTION, dropout=0.3, rng=rng)) for _ in range(1000)]
    assert abs(sum(ours) - sum(theirs)) / 1000 < 0.6
    assert min(sum(ours), sum(theirs)) / 1000 > len(clip_bpe().encode(CAPTION)) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 0.1}, "needs an rng"), ({"dropout": 1.0}, "below 1, got 1.0"), ({"dropout": -0.1}, "got -0.1")],
)
def test_wrong_dropout_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clip_bpe().encode("a", **options)


def test_ids_beyond_the_vocabulary_are_refused():
    for wrong in (-1, 49_408):
        with pytest.raises(ValueError, match=f"0 to 49407, got {wrong}"):
            clip_bpe().decode([320, wrong])


def test_pickling_gives_the_same_tokenizer():
    assert pickle.loads(pickle.dumps(clip_bpe())) is clip_bpe()
