import hashlib
import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

import magma_jax.data.tokenizers.byte_level
from magma_jax.data.tokenizers.byte_level import EOS, IMAGE, Tokenizer, gpt2_tokenizer, train_bpe
from magma_jax.data.tokenizers.settings import settings_of
from tests.data.vocabularies import bytes_alone, pieces, published

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


def test_words_behind_an_image_token_need_rows_too():
    backend = tokenizers.Tokenizer.from_str(train_bpe(CORPUS, 270).to_json())
    assert backend.get_vocab_size() == 270
    assert Tokenizer(backend).vocab_size == 269
    backend.add_special_tokens(["<|other|>"])
    assert Tokenizer(backend).vocab_size == len(Tokenizer(backend)) == 271


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
        assert Tokenizer.load(tmp_path).eos_id == 1
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


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_vocabularies_that_put_a_space_before_a_text(kind, tmp_path):
    """As Llama 2's and that of Mistral 0.3: the first text of a sequence equals transformers', parts join exactly."""
    published(tmp_path, pieces(**{kind: True}), LLAMA, begin="<s>")
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (ours.begin, ours.begin_id) == ("<s>", theirs.bos_token_id)
    for text in ("a b", " a", "caf\u00e9, a", ""):
        assert [ours.begin_id, *ours.encode(text, first=True)] == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
        assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()
    assert ours.encode("a a") + ours.encode(" a") == ours.encode("a a a")
    for text in ("<s>a</s> b", "a<s>b"):
        assert ours.encode_chat(text) == theirs.encode(text, add_special_tokens=False)
    for copy in (Tokenizer.load(ours.save(tmp_path / "again")), pickle.loads(pickle.dumps(ours))):
        assert copy.encode("a b", first=True) == ours.encode("a b", first=True)
        assert (copy.begin_id, copy.settings, copy.to_json()) == (ours.begin_id, ours.settings, ours.to_json())


@pytest.mark.parametrize(("begin", "expected"), [(None, None), ("<s>", "<s>")])
def test_the_begin_of_text_stands_where_transformers_puts_it(begin, expected, tmp_path):
    """By ``tokenizer.json``; ``add_bos_token`` beside it has no effect, as in transformers 5."""
    published(tmp_path, bytes_alone(), LLAMA, begin=begin, add_bos_token=begin is None)
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.begin == expected
    first = [] if ours.begin_id is None else [ours.begin_id]
    assert [*first, *ours.encode("a")] == theirs.encode("a")
    assert Tokenizer.load(ours.save(tmp_path / "again")).begin_id == ours.begin_id


def test_opts_files(tmp_path):
    """GPT-2's vocabulary behind four tokens of its own, as two files."""
    words = {name: number for number, name in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    symbols = [token for token, _ in sorted(gpt2_tokenizer()._published.get_vocab().items(), key=lambda one: one[1])]
    words |= {token: 4 + number for number, token in enumerate(symbols[:50256])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = Path(magma_jax.data.tokenizers.byte_level.__file__).parent / "gpt2" / "merges.txt"
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes())
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    special = {key: {"__type": "AddedToken", "content": value, "special": True} for key, value in special.items()}
    settings = {**special, "add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.eos_id, ours.begin_id, ours.vocab_size) == (2, 2, 50260)
    for text in ("A picture of a cat, isn't it?\n", " caf\u00e9"):
        assert [ours.begin_id, *ours.encode(text)] == theirs.encode(text)
        assert [token - 4 for token in ours.encode(text)] == gpt2_tokenizer().encode(text)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match=r"merges\.txt that is none of a byte-level tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bos_token": 3}, "bos_token in its tokenizer_config.json that is no text"),
        ({"chat_template": 3}, "chat_template that is no text"),
        ({"chat_template": "x" * 300_000}, "chat_template of more than 262144 characters"),
    ],
)
def test_settings_that_cannot_be_used(settings, says, tmp_path):
    published(tmp_path, bytes_alone(), LLAMA, **settings)
    with pytest.raises(ValueError, match=says) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_several_ends_of_text(tmp_path):
    """Those of ``generation_config.json``, or else of ``config.json``, beside the vocabulary's own."""
    backend = bytes_alone()
    backend.add_special_tokens(["<turn>", "<message>"])
    published(tmp_path, backend, {"eos_token": "<turn>"})
    assert Tokenizer.load(tmp_path).end_ids == (256,)
    (tmp_path / "config.json").write_text('{"eos_token_id": [257, 256]}')
    assert Tokenizer.load(tmp_path).end_ids == (256, 257)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.load(tmp_path).end_ids == (256, 257)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 300}')
    found = Tokenizer.load(tmp_path)
    assert (found.eos_id, found.end_ids) == (256, (256, 300))
    again = Tokenizer.load(found.save(tmp_path / "again"))
    settings = settings_of(json.loads(found.settings_to_save.as_json()))
    for copy in (again, pickle.loads(pickle.dumps(found)), Tokenizer.from_json(found.to_json(), settings=settings)):
        assert (copy.eos, copy.end_ids) == ("<turn>", (256, 300))
    one = published(tmp_path / "again", bytes_alone(), LLAMA)
    for content, says in (
        ("[64]", "has the usual word 'a' at id 64, which is named as an end of text; it belongs to another model"),
        ('"<turn>"', "eos_token_id that is neither an id nor a list of ids, but '<turn>'"),
        ("[true]", r"neither an id nor a list of ids, but \[True\]"),
    ):
        (one / "generation_config.json").write_text(f'{{"eos_token_id": {content}}}')
        with pytest.raises(ValueError, match=says) as caught:
            Tokenizer.load(one)
        assert "\n" not in str(caught.value)
    (one / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has a generation_config.json beside it that cannot be read \(not valid"):
        Tokenizer.load(one)
    (one / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json that holds no settings, but \[\]"):
        Tokenizer.load(one)


def test_tokens_behind_every_text_are_refused():
    backend = bytes_alone()
    backend.add_special_tokens([EOS])
    around = tokenizers.processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 256)])
    backend.post_processor = around
    with pytest.raises(ValueError, match="puts more around a text than one token before it"):
        Tokenizer(backend)


def test_texts_that_spell_special_tokens_of_a_chat(tmp_path):
    words = Tokenizer.load(published(tmp_path, bytes_alone(), LLAMA))
    assert words.eos_id in words.encode_chat("a</s>")
    assert not words.special_ids & set(words.encode_chat(words.spell_out("<s>a</s><|image|><s</s>>")))
    assert words.spell_out("a < b") == "a < b"
