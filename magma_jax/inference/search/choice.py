"""Choosing among given answers by their probability: multiple choice, and questions with a closed list of answers.

    batch = model.preprocess_batch([[ImageInput("cat.png"), "Q: Is it a cat or a dog? A:"]])
    best = rank(score(model, batch, [[" a cat", " a dog"]])[0])[0]
    print(best.text, best.probability)

A prompt is run once, whatever the number of its answers; these continue from its cache, many at a time.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.inference.answers import Measure
from magma_jax.inference.batched import as_batch, pad_to_bucket
from magma_jax.inference.buckets import CHOICES
from magma_jax.inference.decoding.decode import run_prompts
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import PromptBatch
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Float, Int, Params

# Answers that are run together.
ROWS = 16


class ScoredAnswer(NamedTuple):
    """A given answer and what the model makes of it.

    Attributes:
        text: the answer.
        logprobs: of each of its tokens after those before it, and of the end of text last, if that was counted.
        probability: share among the answers of the same question, by the measure of ``rank``; they sum to 1.
    """

    text: str
    logprobs: tuple[float, ...]
    probability: float = math.nan

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer."""
        return math.fsum(self.logprobs)

    def measured(self, measure: Measure) -> float:
        """What answers are compared by."""
        return self.logprob / (len(self.logprobs) if measure == "mean" else 1)


def score(
    model: TokenGenerator,
    embeddings: Float[Array, "B S D"] | PromptBatch,
    answers: Sequence[Sequence[str]],
    *,
    end: bool = True,
) -> list[list[ScoredAnswer]]:
    """Log-probabilities of given answers.

    Args:
        model: any.
        embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
        answers: for each prompt its own, as they continue it: mostly with a space in front.
        end: count the end of text too. Without it " red" is at least as likely as " red square".

    Raises:
        ValueError: no or an empty answer, or prompt and answer exceed the context.
    """
    batch = as_batch(embeddings)
    if len(answers) != batch.embeddings.shape[0]:
        raise ValueError(f"{len(answers)} lists of answers for {batch.embeddings.shape[0]} prompts; give one a prompt")
    rows = [(i, text, _tokens(model, text, end)) for i, texts in enumerate(answers) for text in texts]
    for i, texts in enumerate(answers):
        if not texts:
            raise ValueError(f"prompt {i} has no answers to choose from")
    lengths, context = np.asarray(batch.lengths), model.lm_config.context_length
    for i, text, tokens in rows:
        if lengths[i] + len(tokens) > context:
            raise ValueError(
                f"prompt {i} has {lengths[i]} positions and the answer {text!r:.40} {len(tokens)} tokens, but the "
                f"context holds {context}"
            )
    width = CHOICES.fit(max(len(tokens) for *_, tokens in rows))
    prompts = pad_to_bucket(batch.embeddings)
    cache, first = _prefill(model.graphdef, model.params, prompts, batch.lengths, slots=prompts.shape[1] + width)
    found: list[list[ScoredAnswer]] = [[] for _ in answers]
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        owners, tokens = np.zeros(ROWS, np.int32), np.zeros((ROWS, width), np.int32)
        for row, (i, _, ids) in enumerate(some):
            owners[row], tokens[row, : len(ids)] = i, ids
        logprobs = np.asarray(_continue(model.graphdef, model.params, cache, first, batch.lengths, owners, tokens))
        for row, (i, text, ids) in enumerate(some):
            found[i].append(ScoredAnswer(text, tuple(logprobs[row, : len(ids)].tolist())))
    return found


def rank(answers: Sequence[ScoredAnswer], measure: Measure = "sum") -> list[ScoredAnswer]:
    """The answers of one question, likeliest first, with their ``probability``; equals keep their order."""
    values = np.array([answer.measured(measure) for answer in answers])
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    order = np.argsort(-values, kind="stable")
    return [answers[i]._replace(probability=float(shares[i])) for i in order]


def _tokens(model: TokenGenerator, text: str, end: bool) -> list[int]:
    tokens = model.tokenizer.encode(text)
    if not tokens:
        raise ValueError("an empty answer cannot be chosen; leave it out")
    return [*tokens, model.tokenizer.eos_id] if end else tokens


@platform_jit(static_argnames=("graphdef", "slots"))
def _prefill(
    graphdef: Definition, params: Params, embeddings: Float[Array, "B S D"], lengths: Int[Array, " B"], *, slots: int
) -> tuple[KVCache, Float[Array, "B V"]]:
    """The cache of the prompts, with room for answers, and the logits of what follows them."""
    return run_prompts(merge(graphdef, params).lm, embeddings, lengths, slots=slots)


@platform_jit(static_argnames=("graphdef",))
def _continue(
    graphdef: Definition,
    params: Params,
    cache: KVCache,
    first: Float[Array, "B V"],
    lengths: Int[Array, " B"],
    owners: Int[Array, " R"],
    tokens: Int[Array, "R T"],
) -> Float[Array, "R T"]:
    """Log-probability of every token of R answers, each behind the prompt that it belongs to."""
    lm = merge(graphdef, params).lm
    positions = lengths[owners][:, None] + jnp.arange(tokens.shape[1] - 1)
    embedded = lm.embed(tokens[:, :-1], cache.dtype)
    hidden = lm(embedded, positions=positions, cache=cache.rows(owners)).hidden
    of = functools.partial(_logprob, table=lm.config.vocab_rows)
    rest = jax.lax.map(lambda one: of(lm.logits(one[0]), one[1]), (hidden, tokens[:, 1:]))
    return jnp.concatenate([of(first[owners], tokens[:, 0])[:, None], rest], axis=1)


def _logprob(logits: Float[Array, "N V"], tokens: Int[Array, " N"], *, table: int) -> Float[Array, " N"]:
    """Under the model, as for sampled tokens: ids that have no embedding do not count."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits[:, :table]), tokens[:, None], axis=1)[:, 0]
