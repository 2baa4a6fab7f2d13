"""Perplexity of a text: every token predicted once, from what stands before it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.metrics.perplexity import measure, perplexity


def test_a_text_within_one_window_is_predicted_from_all_that_precedes(talkative):
    text = "A picture of a red square. Q: What colour is it? A: red"
    ids = np.array(talkative.tokenizer.encode(text))
    assert len(ids) < 64
    logits = talkative(talkative.embed_tokens(ids)[None]).logits[0, :-1]
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), ids[1:]]
    found = perplexity(talkative, text)
    assert found.tokens == len(ids) - 1
    assert found.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    later = len(text.encode()) - len(talkative.tokenizer.decode(ids[:1].tolist()).encode())
    assert found.bits_per_byte == pytest.approx(float(losses.sum()) / math.log(2) / later, rel=1e-5)


def test_a_long_text_is_read_in_windows_that_overlap(talkative, tmp_path):
    text = " ".join(f"a {name} square" for name in ("red", "green", "blue", "white")) * 12
    ids = talkative.tokenizer.encode(text)
    assert len(ids) > 130
    found = perplexity(talkative, text, batch_size=3)
    assert found.tokens == len(ids) - 1
    # The first window's tokens are predicted as in a text that ends there.
    total = 0.0
    for first, last in [(1, 65)] + [(start + 33, start + 65) for start in range(32, len(ids) - 32, 32)]:
        start = max(0, first - 33)
        piece = jnp.asarray(ids[start : last - 1])
        scores = jax.nn.log_softmax(talkative(talkative.embed_tokens(piece)[None]).logits[0])
        total -= sum(float(scores[i - start - 1, ids[i]]) for i in range(first, min(last, len(ids))))
    assert math.log(found.perplexity) == pytest.approx(total / found.tokens, rel=1e-4)
    (tmp_path / "text.txt").write_text(text)
    both = measure(talkative, tmp_path / "text.txt")
    assert both["model"]["perplexity"] == pytest.approx(found.perplexity, rel=1e-5)
    assert both["without_adapters"]["perplexity"] != both["model"]["perplexity"]


def test_a_text_of_one_token_is_refused(talkative):
    with pytest.raises(DataError, match="has 1 tokens"):
        perplexity(talkative, "a")
