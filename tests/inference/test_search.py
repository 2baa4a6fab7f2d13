"""Answers that are compared whole: given ones by score, and the likeliest by beam search."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax import Magma
from magma_jax.data.images import ImageInput
from magma_jax.inference.search.beam import beam_search
from magma_jax.inference.search.choice import ROWS, ScoredAnswer, rank, score
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from tests import tiny

IMAGE = ImageInput(Image.new("RGB", (64, 64), "red"))


@pytest.fixture(scope="module")
def model():
    params = split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1]
    params = {k: 6 * v if v.ndim > 1 else v for k, v in params.items()}
    tokenizer = tiny.dataset().tokenizer
    # The end of text is likely enough to matter.
    params["lm/lm_head/bias"] = params["lm/lm_head/bias"].at[tokenizer.eos_id].set(3.0)
    return Magma(tiny.MODEL, params, tokenizer)


@pytest.fixture(scope="module")
def batch(model):
    return model.preprocess_batch([[IMAGE, "Q: What colour? A:"], ["a"]])


def whole(model, prompt, tokens):
    """Log-probability of each token, by a forward pass over everything."""
    embeddings = np.zeros((1, 32, 32), np.float32)  # one length, one program
    embeddings[0, : len(prompt) + len(tokens)] = np.concatenate([prompt, model.embed_tokens(tokens)])
    logits = np.asarray(model(jnp.asarray(embeddings)).logits)[0, len(prompt) - 1 :, : tiny.MODEL.lm.vocab_rows]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(tokens)), tokens]


def test_scores_are_those_of_the_whole_text(model, batch):
    answers = [[" a red square", " white"], [" blue"]]
    for end in (True, False):
        found = score(model, batch, answers, end=end)
        for row, (texts, scored) in enumerate(zip(answers, found, strict=True)):
            prompt = batch.embeddings[row, : int(batch.lengths[row])]
            for text, answer in zip(texts, scored, strict=True):
                tokens = model.tokenizer.encode(text) + [model.tokenizer.eos_id] * end
                assert answer.text == text
                np.testing.assert_allclose(answer.logprobs, whole(model, prompt, tokens), atol=2e-4)


def test_an_answer_may_end_in_any_of_several_ways(model, batch):
    texts = [[" white"], [" blue"]]
    one = score(model, batch, texts)
    other = tiny.MODEL.lm.vocab_rows - 1
    bias = "lm/lm_head/bias"
    params = model.params | {bias: model.params[bias].at[other].set(3.0)}
    model = Magma(tiny.MODEL, params, tiny.with_ends(model.tokenizer, other))
    for row, (single, either) in enumerate(zip(one, score(model, batch, texts), strict=True)):
        prompt = batch.embeddings[row, : int(batch.lengths[row])]
        tokens = model.tokenizer.encode(texts[row][0])
        by_end = [whole(model, prompt, [*tokens, end])[-1] for end in model.tokenizer.end_ids]
        assert len(either[0].logprobs) == len(single[0].logprobs)
        assert either[0].logprobs[-1] == pytest.approx(np.logaddexp(*by_end), abs=2e-4)
        assert either[0].logprobs[-1] > max(by_end) + 1e-3


def test_more_answers_than_run_together(model, batch):
    texts = [f" {letter}" for letter in "abcdefghijklmnopqrstuvw"]
    assert len(texts) > ROWS
    together = score(model, batch, [texts, texts[:1]])
    assert [answer.text for answer in together[0]] == texts
    alone = score(model, batch, [texts[-1:], texts[:1]])
    np.testing.assert_allclose(together[0][-1].logprobs, alone[0][0].logprobs, atol=1e-5)


def test_ranks_by_sum_or_mean():
    answers = [ScoredAnswer("long", (-1.0, -1.0, -1.0)), ScoredAnswer("short", (-2.0,)), ScoredAnswer("same", (-2.0,))]
    assert [answer.text for answer in rank(answers)] == ["short", "same", "long"]
    best, *others = rank(answers, "mean")
    assert best.text == "long"
    assert best.probability == pytest.approx(math.exp(-1) / (math.exp(-1) + 2 * math.exp(-2)))
    assert sum(answer.probability for answer in (best, *others)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([["a"]], "1 lists of answers for 2 prompts"),
        ([["a"], []], "prompt 1 has no answers"),
        ([["a"], [""]], "an empty answer"),
        ([["a"], ["a red " * 40]], "context holds 64"),
    ],
)
def test_answers_that_cannot_be_scored(model, batch, answers, says):
    with pytest.raises(ValueError, match=says):
        score(model, batch, answers)


@pytest.mark.parametrize(("penalty", "others"), [(0.0, ()), (1.0, (tiny.MODEL.lm.vocab_rows - 1,))])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all(model, batch, penalty, others):
    rows, ends = tiny.MODEL.lm.vocab_rows, (model.tokenizer.eos_id, *others)
    bias = "lm/lm_head/bias"
    params = model.params | {bias: model.params[bias].at[jnp.array(ends)].set(3.0)}
    model = Magma(tiny.MODEL, params, tiny.with_ends(model.tokenizer, *others))
    assert model.tokenizer.end_ids == ends
    prompt = batch.embeddings[1, :1]
    words = model.embed_tokens(range(rows))[:, None]
    logits = model(jnp.concatenate([jnp.broadcast_to(prompt, (rows, *prompt.shape)), words], axis=1)).logits
    logprobs = np.asarray(jax.nn.log_softmax(logits[..., :rows]), np.float64)
    first, second = logprobs[0, 0], logprobs[:, 1]
    totals = {(end,): first[end] for end in ends}
    totals |= {(a, b): first[a] + second[a, b] for a, b in itertools.product(range(rows), repeat=2) if a not in ends}
    expected = sorted(((value / len(ids) ** penalty, ids) for ids, value in totals.items()), reverse=True)[:3]
    found = beam_search(model, batch.embeddings[1:, :1], 2, beams=rows, n=3, length_penalty=penalty)[0]
    assert [hypothesis.tokens for hypothesis in found] == [
        tuple(token for token in ids if token not in ends) for _, ids in expected
    ]
    np.testing.assert_allclose([hypothesis.score for hypothesis in found], [value for value, _ in expected], atol=1e-4)
    assert [hypothesis.finished for hypothesis in found] == [ids[-1] in ends for _, ids in expected]


def test_every_prompt_gets_what_it_gets_alone(model, batch):
    together = beam_search(model, batch, 6, beams=3, n=3)
    for row, found in enumerate(together):
        alone = beam_search(model, batch.embeddings[row : row + 1, : int(batch.lengths[row])], 6, beams=3, n=3)[0]
        assert [hypothesis.text for hypothesis in alone] == [hypothesis.text for hypothesis in found]
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
        prompt = batch.embeddings[row, : int(batch.lengths[row])]
        for hypothesis in found:
            tokens = [*hypothesis.tokens, *[model.tokenizer.eos_id] * hypothesis.finished]
            assert hypothesis.logprob == pytest.approx(whole(model, prompt, tokens).sum(), abs=1e-3)
            assert hypothesis.score == pytest.approx(hypothesis.logprob / len(tokens), rel=1e-5)


def test_one_beam_is_greedy(model, batch):
    biased = dict(model.params)
    biased["lm/lm_head/bias"] = biased["lm/lm_head/bias"].at[model.tokenizer.eos_id].set(-100.0)
    model = Magma(tiny.MODEL, biased, model.tokenizer)
    found = beam_search(model, batch, 6, beams=1)
    assert [row[0].text for row in found] == model.generate(batch, 6, temperature=0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beams": 2, "n": 3}, "n must lie"),
        ({"beams": 0}, "n must lie"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"max_steps": 64}, "context holds 64"),
    ],
)
def test_searches_that_make_no_sense(model, batch, options, says):
    with pytest.raises(ValueError, match=says):
        beam_search(model, batch, **{"max_steps": 4, **options})


def test_prompts_repeated_give_several_samples(model, batch):
    twice = batch.repeat(3)
    assert twice.lengths.tolist() == [length for length in batch.lengths.tolist() for _ in range(3)]
    texts = model.generate(twice, 6, temperature=2.0, seed=[1, 2, 3, 1, 2, 3])
    assert len(set(texts[:3])) > 1
    assert texts[:1] == model.generate(batch, 6, temperature=2.0, seed=[1, 2])[:1]
