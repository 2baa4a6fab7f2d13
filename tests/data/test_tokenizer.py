import hashlib
import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

import magma_jax.data.tokenizers.byte_level
from magma_jax.data.tokenizers.byte_level import EOS, IMAGE, Tokenizer, gpt2_tokenizer, train_bpe
from tests.data.vocabularies import pieces

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/golden/tokenizer.json").read_text())
CORPUS = [f"a {colour} {thing} on the {place}" for colour in ("red", "green", "blue", "grey")
          for thing in ("cat", "dog", "truck") for place in ("grass", "road", "table")]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return gpt2_tokenizer()


def test_the_merges_are_the_published_ones(gpt2):
    merges = Path(magma_jax.data.tokenizers.byte_level.__file__).parent / "gpt2" / "merges.txt"
    assert hashlib.sha256(merges.read_bytes()).hexdigest() in GOLDEN["vocab_source"]


def test_the_bytes_of_tokens_join_to_the_text(gpt2):
    for tokenizer in (gpt2, train_bpe(CORPUS, 270)):
        text = "caf\u00e9 \U0001f600\n of\t"
        ids = tokenizer.encode(text)
        assert (
            b"".join(map(tokenizer.token_bytes, [*ids, tokenizer.eos_id, tokenizer.image_id, 10**6])) == text.encode()
        )


def test_properties_equal_the_originals(gpt2):
    properties = GOLDEN["properties"]
    assert len(gpt2) == properties["length"] == 50258
    assert gpt2.vocab_size == properties["vocab_size"]
    assert gpt2.eos_id == properties["eos_token_id"]
    assert gpt2.pad_id == properties["pad_token_id"]
    assert gpt2.image_id == properties["cls_token_id"]


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: repr(case["text"])[:20])
def test_encoding_and_padding_equal_the_originals(gpt2, case):
    ids = gpt2.encode(case["text"], parse_special=True)
    assert ids == case["ids"]
    assert ids + [gpt2.pad_id] * (24 - len(ids)) == case["padded_24"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: str(case["ids"])[:20])
def test_decoding_equals_the_originals(gpt2, case):
    assert gpt2.decode(case["ids"], skip_special=False, clean_up=True) == case["decoded"]


def test_spelling_a_special_token_does_not_make_one(gpt2):
    for text in ("end<|endoftext|>again", "an image of <|image|> here", "<|image|>"):
        plain = gpt2.encode(text)
        assert not {gpt2.eos_id, gpt2.image_id} & set(plain)
        assert gpt2.decode(plain) == text
        assert {gpt2.eos_id, gpt2.image_id} & set(gpt2.encode(text, parse_special=True))


def test_decoding_inverts_encoding_for_any_text(gpt2):
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(160, 0x2FFF)))) for _ in range(20))
        assert gpt2.decode(gpt2.encode(text)) == text
    spaced = "Wait , what ? It is n't so ."
    assert gpt2.decode(gpt2.encode(spaced)) == spaced


def test_special_tokens_are_skipped_or_shown(gpt2):
    ids = [gpt2.image_id, 32, gpt2.eos_id]
    assert gpt2.decode(ids) == "A"
    assert gpt2.decode(ids, skip_special=False) == "<|image|>A<|endoftext|>"


def test_training_is_deterministic_and_complete():
    first = train_bpe(CORPUS, 290)
    second = train_bpe(iter(reversed(CORPUS)), 290)
    assert first.to_json() == second.to_json()
    assert len(first) == 290
    assert (first.eos_id, first.image_id) == (288, 289)
    text = "a red cat — on the naïve <|image|> 東京"
    assert first.decode(first.encode(text)) == text
    assert first.encode(f"cat{IMAGE}", parse_special=True)[-1] == 289
    assert len(first.encode("a red cat")) < len(b"a red cat")
    assert len(train_bpe([], 300)) == 258
    with pytest.raises(ValueError, match="below 258"):
        train_bpe(CORPUS, 257)


def test_saving_and_loading_gives_the_same_tokenizer(tmp_path):
    trained = train_bpe(CORPUS, 280)
    file = trained.save(tmp_path / "made" / "here")
    for loaded in (Tokenizer.load(file), Tokenizer.load(file.parent)):
        assert len(loaded) == len(trained)
        assert (loaded.eos_id, loaded.image_id) == (trained.eos_id, trained.image_id)
        for text in (*CORPUS[:3], "unseen <|image|> words"):
            assert loaded.encode(text) == trained.encode(text)
            assert loaded.encode(text, parse_special=True) == trained.encode(text, parse_special=True)
    # The file is the common format: another library reads it and agrees.
    other = PreTrainedTokenizerFast(tokenizer_file=str(file))
    assert other(CORPUS[0])["input_ids"] == trained.encode(CORPUS[0])


def test_a_copy_sent_to_a_worker_behaves_alike(gpt2):
    copy = pickle.loads(pickle.dumps(gpt2))
    text = "end<|endoftext|>again"
    assert copy.encode(text) == gpt2.encode(text)
    assert copy.encode(text, parse_special=True) == gpt2.encode(text, parse_special=True)


def test_other_vocabularies_get_an_image_token_and_need_an_eos(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<end>": 1, "b": 2}, merges=[]))
    backend.enable_padding(length=9)
    backend.enable_truncation(1)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no end-of-text token '<\|endoftext\|>'"):
        Tokenizer.load(tmp_path)
    loaded = Tokenizer.load(tmp_path, eos="<end>")
    assert (loaded.eos_id, loaded.image_id, len(loaded)) == (1, 3, 4)
    assert loaded.encode("ab") == [0, 2]  # the file's padding and truncation do not apply
    (tmp_path / "page.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.json' is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "page.json")
    settings = tmp_path / "tokenizer_config.json"
    for named in ("<end>", {"content": "<end>", "lstrip": False}):
        settings.write_text(json.dumps({"eos_token": named}))
        assert Tokenizer.load(tmp_path) is loaded
    # Saved with its end of text.
    assert Tokenizer.load(loaded.save(tmp_path / "again")).eos_id == 1
    settings.write_text('{"eos_token": 3}')
    with pytest.raises(ValueError, match=r"has an eos_token in its tokenizer_config\.json that is no text"):
        Tokenizer.load(tmp_path)


def test_vocabularies_of_pieces():
    words = Tokenizer.from_json(pieces().to_str())
    assert (words.eos, words.eos_id, words.image_id) == ("<eos>", 0, 263)
    for text in (" a  b,\n", "caf\u00e9 \u732b", "<0x41>"):
        ids = words.encode(text)
        assert words.decode(ids) == text
        assert b"".join(map(words.token_bytes, [*ids, words.eos_id])) == text.encode()
        assert len(ids) * words.longest >= len(text.encode())


def test_an_eos_with_id_zero_works():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={EOS: 0, "a": 1}, merges=[]))
    tokenizer = Tokenizer(backend)
    assert tokenizer.eos_id == 0
    assert tokenizer.pad_id == 0
    assert tokenizer.decode([1, 0]) == "a"
