"""Tokens become text a piece at a time: the same as all at once, and no slower at the end than at the beginning."""

import random

import pytest

from magma_jax.data.tokenizers.byte_level import gpt2_tokenizer
from magma_jax.inference.batching.requests import TextAssembler

TOKENIZER = gpt2_tokenizer()
WORDS = ["a", "b", "ab", "\n", " ", "\u00e9", "\U0001f600", "\u6f22", "Q:", "\ufffd"]


def random_tokens(rng):
    """Words; or tokens that are no text, with special ones and ids of nothing among them."""
    if rng.random() < 0.5:
        return TOKENIZER.encode("".join(rng.choices(WORDS, k=rng.randint(1, 20))))
    return [rng.choice([rng.randrange(256), rng.randrange(50_300)]) for _ in range(rng.randint(1, 20))]


def random_stops(rng, text):
    """Some of them parts of the text."""
    starts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(4))]
    stops = [text[start : start + rng.randint(1, 4)] or rng.choice(WORDS) for start in starts]
    return [stop for stop in stops if "\ufffd" not in stop]


def in_bursts(rng, tokens, stops):
    """Text and number of tokens that count, added a few at a time."""
    answer, shown, at = TextAssembler(TOKENIZER, stops), "", 0
    while at < len(tokens):
        burst = tokens[at : at + rng.randint(1, 5)]
        text, used = answer.add(burst, last=at + len(burst) == len(tokens))
        shown += text
        if used is not None:
            return shown, at + used
        at += len(burst)
    return shown, at


def at_once(tokens, stops):
    """The same by its definition."""
    for count in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:count])
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], count
    return TOKENIZER.decode(tokens), len(tokens)


def test_any_text_with_any_stops():
    rng = random.Random(0)
    for _ in range(2_000):
        tokens = random_tokens(rng)
        stops = random_stops(rng, TOKENIZER.decode(tokens))
        assert in_bursts(rng, tokens, stops) == at_once(tokens, stops), (tokens, stops)


class Counting:
    """A tokenizer that counts what it is asked."""

    def __init__(self):
        self.asked = 0

    def token_bytes(self, token):
        self.asked += 1
        return TOKENIZER.token_bytes(token)


@pytest.mark.parametrize("stops", [(), ("\n",), ("\n", "Q:", "#" * 256, "a dog which" * 20)])
def test_every_token_is_decoded_once_and_little_is_held_back(stops):
    tokenizer = Counting()
    answer = TextAssembler(tokenizer, stops)
    tokens = TOKENIZER.encode(" A dog which runs along the beach in the evening light.") * 200
    for at in range(0, len(tokens), 8):
        answer.add(tokens[at : at + 8], last=False)
        assert len(answer.held) < max(map(len, stops), default=1)
    assert tokenizer.asked == len(tokens)
