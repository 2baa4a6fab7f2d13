"""Batches: labels, nothing cut silently, and resuming at the exact sample."""

import numpy as np
import pytest

from magma_jax.data.batches.pipeline import encode_sample, sample_batches, text_batches
from magma_jax.data.format.records import Sample
from magma_jax.data.tokenizers.byte_level import gpt2_tokenizer
from magma_jax.typing import IGNORED

TOKENIZER = gpt2_tokenizer()


def _samples(count):
    return [Sample(i, "A picture of", f" number {i}", "caption") for i in range(count)]


def _batches(**changes):
    options = {"batch_size": 3, "length": 12, "seed": 5} | changes
    return sample_batches([_samples(7), _samples(4)], [0.75, 0.25], TOKENIZER, **options)


def test_labels_are_the_answer_and_one_end_of_text():
    encoded = encode_sample(Sample(4, "A picture of", " a cat", "caption"), TOKENIZER, 10)
    prompt, answer = TOKENIZER.encode("A picture of"), TOKENIZER.encode(" a cat")
    np.testing.assert_array_equal(encoded["labels"], [*[IGNORED] * len(prompt), *answer, TOKENIZER.eos_id])
    np.testing.assert_array_equal(encoded["tokens"], [*prompt, *answer, TOKENIZER.eos_id])
    assert encoded["image_rows"] == 4


def test_the_prompt_is_learned_if_asked():
    encoded = encode_sample(Sample(4, "A", " cat", "caption", learn_prompt=True), TOKENIZER, 5)
    np.testing.assert_array_equal(encoded["labels"], encoded["tokens"])


def test_a_text_spelling_the_end_token_does_not_end_the_sample():
    encoded = encode_sample(Sample(0, "A", " <|endoftext|> cat", "caption"), TOKENIZER, 20)
    assert (encoded["labels"] == TOKENIZER.eos_id).sum() == 1


def test_a_sample_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"has \d+ tokens, but data\.length is 4"):
        encode_sample(Sample(0, "A picture of", " a cat", "caption"), TOKENIZER, 4)


def test_a_sample_that_does_not_fit_is_cut_and_counted_if_asked():
    sample = Sample(0, "A picture of", " a cat", "caption")
    whole = encode_sample(sample, TOKENIZER, 10, overlong="truncate")
    cut = encode_sample(sample, TOKENIZER, 4, overlong="truncate")
    assert (whole["truncated"], cut["truncated"]) == (0, 1)
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(cut[name], whole[name][:4])
    batches = iter(_batches(length=5, overlong="truncate"))
    np.testing.assert_array_equal(next(batches)["truncated"], [1, 1, 1])


def test_batches_of_several_lengths_and_packed_ones_come_from_the_same_samples():
    buckets, packed = next(iter(_batches(buckets=(6, 8)))), next(iter(_batches(length=30, pack=4)))
    assert buckets["tokens"].shape[1] in (6, 8, 12)
    assert packed["tokens"].shape == (3, 30)
    assert packed["image_rows"].shape == (3, 4)
    assert packed["segments"].max() > 1


def test_every_sample_of_a_source_comes_before_any_comes_again():
    batches = iter(sample_batches([_samples(6)], [1.0], TOKENIZER, batch_size=2, length=12, seed=0))
    epochs = [np.concatenate([next(batches)["image_rows"] for _ in range(3)]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert list(epochs[0]) != list(epochs[1])


def test_a_restored_iterator_continues_with_the_next_batch():
    whole = iter(_batches())
    expected = [next(whole) for _ in range(6)]
    first = iter(_batches())
    for _ in range(2):
        next(first)
    second = iter(_batches())
    second.set_state(first.get_state())
    for batch in expected[2:]:
        for name, array in next(second).items():
            np.testing.assert_array_equal(array, batch[name])


def test_another_seed_gives_another_order():
    assert any((next(iter(_batches()))["tokens"] != next(iter(_batches(seed=6)))["tokens"]).ravel())


def test_text_is_cut_into_whole_blocks():
    tokens = np.arange(23, dtype=np.int32)
    batches = iter(text_batches(tokens, -tokens, batch_size=2, length=5, seed=0))
    parts = [next(batches) for _ in range(2)]
    seen, labels = (np.concatenate([part[name] for part in parts]) for name in ("tokens", "labels"))
    assert sorted(map(tuple, seen)) == [tuple(range(i, i + 5)) for i in range(0, 20, 5)]
    np.testing.assert_array_equal(labels, -seen)
