"""One layout of prompts, one policy of lengths, one kind of answer."""

import numpy as np
import pytest
from PIL import Image

from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.inference.answers import Answer
from magma_jax.inference.buckets import CHOICES, EVALUATION, SEQUENCES, Buckets
from magma_jax.inference.prompts import WORD, ImageSpec, lay_out, lay_out_prompt, lay_out_tokens, pad_layouts
from tests import tiny
from tests.data.vocabularies import pieces, published

TOKENIZER = tiny.dataset().tokenizer
SPEC = ImageSpec(size=8, positions=3)


def image(colour):
    return ImageInput(Image.new("RGB", (8, 8), colour))


def test_a_length_has_the_next_bucket_and_beyond_the_last_a_multiple():
    assert [CHOICES.fit(length) for length in (1, 4, 5, 64, 65, 129)] == [4, 4, 8, 64, 128, 192]
    assert [EVALUATION.fit(length) for length in (1, 128, 129, 512, 513, 641)] == [16, 128, 160, 512, 640, 768]
    assert [SEQUENCES.fit(length) for length in (33, 2048, 2049)] == [48, 2048, 4096]
    assert SEQUENCES.up_to(50).sizes == (32, 48, 50)
    assert Buckets((2,), step=3).fit(4) == 6


def test_every_position_says_what_stands_there():
    layout = lay_out_prompt(["a", image("red"), image("blue"), image("red")], TOKENIZER, SPEC)
    (word,) = TOKENIZER.encode("a")
    assert layout.tokens.tolist() == [word, *[0] * 9]
    assert layout.places.tolist() == [WORD, *range(9)]
    assert layout.image_starts == [1, 4, 7]
    assert layout.images[0] == layout.images[2] != layout.images[1]
    assert layout.pixels.keys() == set(layout.images)
    identity = layout.identity
    assert identity[0].tolist() == [word, 0, 0]
    assert identity[1:4, 0].tolist() == [-1, -2, -3]
    np.testing.assert_array_equal(identity[1:4], identity[7:])
    assert not (identity[1:4, 1:] == identity[4:7, 1:]).all()


def test_places_point_into_a_table_of_images():
    layout = lay_out(["a", 70, "a", 71], TOKENIZER, 3)
    asked = []
    places = layout.table_places(lambda key: asked.append(key) or key - 65)
    assert (asked, places.tolist()) == ([70, 71], [WORD, 15, 16, 17, WORD, 18, 19, 20])
    asked.clear()  # of images before the start nobody asks
    assert layout.table_places(lambda key: asked.append(key) or 0, start=6).tolist() == [1, 2]
    assert asked == [71]


def test_a_sequence_begins_as_the_tokenizer_says(tmp_path):
    words = Tokenizer.load(published(tmp_path, pieces(prepend=True), {"eos_token": "<eos>"}, begin="<unk>"))
    (a,), (space_a,) = words.encode("a"), words.encode(" a")
    for items, ids in {("a", "a"): [space_a, a], ("", "a"): [space_a], (7, "a", 8, "a"): [0, space_a, 0, a]}.items():
        assert lay_out(items, words, 1).tokens.tolist() == [1, *ids]
    with pytest.raises(ValueError, match="the prompt is empty"):
        lay_out_prompt([""], words, SPEC)


def test_layouts_are_padded_to_one_length():
    padded = pad_layouts([lay_out([5], TOKENIZER, 2), lay_out_tokens([7, 8, 9], 10)], 4)
    assert padded["tokens"].tolist() == [[0, 0, 0, 0], [7, 8, 9, 0]]
    assert padded["places"].tolist() == [[0, 1, WORD, WORD], [WORD] * 4]
    assert padded["lengths"].tolist() == [2, 3]


def test_what_is_no_prompt():
    with pytest.raises(ValueError, match="row 3 is empty: give at least one image or one word"):
        lay_out_prompt([""], TOKENIZER, SPEC, name="row 3")
    with pytest.raises(ValueError, match="the prompt has 2 images, at most 1 are taken"):
        lay_out_prompt([image("red"), image("blue")], TOKENIZER, SPEC, max_images=1)
    with pytest.raises(ValueError, match="the prompt has token 10, the vocabulary has 10"):
        lay_out_tokens([10], 10)


def test_the_text_of_an_answer_is_that_of_its_parts():
    parts = ("a ", Image.new("RGB", (1, 1)), "b")
    assert Answer(parts=parts, tokens=(), logprob=0.0, finish="stop").text == "a b"
