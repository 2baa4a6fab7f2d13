"""Choice among given answers by probability: multiple choice, and questions with a closed list of answers.

    batch = model.preprocess_batch([[ImageInput("cat.png"), "Q: Is it a cat or a dog? A:"]])
    best = rank(score(model, batch, [[" a cat", " a dog"]])[0])[0]
    print(best.text, best.probability)

A prompt is run once; its answers continue from its cache, many at a time.
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

# Answers per batch.
ROWS = 16


class ScoredAnswer(NamedTuple):
    """A given answer with its log-probabilities.

    Attributes:
        text: the answer.
        logprobs: log-probability of each token given the earlier ones; the end of text is last, if counted: that of any
            of the tokenizer's ends.
        probability: share among the answers to the same question, by the measure of ``rank``; they sum to 1.
    """

    text: str
    logprobs: tuple[float, ...]
    probability: float = math.nan

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer."""
        return math.fsum(self.logprobs)

    def measured(self, measure: Measure) -> float:
        """The value that answers are compared by."""
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
        model: any autoregressive text model.
        embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
        answers: answers to each prompt, as they continue it: usually with a leading space.
        end: whether to count the end of text. Without it " red" is at least as likely as " red square".

    Raises:
        ValueError: no answers, an empty answer, or prompt and answer exceed the context.
    """
    batch = as_batch(embeddings)
    if len(answers) != batch.embeddings.shape[0]:
        raise ValueError(f"{len(answers)} lists of answers for {batch.embeddings.shape[0]} prompts; give one a prompt")
    rows = [(i, text, _tokens(model, text, end)) for i, texts in enumerate(answers) for text in texts]
    for i, texts in enumerate(answers):
        if not texts:
            raise ValueError(f"prompt {i} has no answers to choose from")
    ends = jnp.array(model.tokenizer.end_ids)
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
        given = cache, first, batch.lengths, owners, tokens
        logprobs = np.asarray(_continue(model.graphdef, model.params, *given, ends))
        for row, (i, text, ids) in enumerate(some):
            found[i].append(ScoredAnswer(text, tuple(logprobs[row, : len(ids)].tolist())))
    return found


def rank(answers: Sequence[ScoredAnswer], measure: Measure = "sum") -> list[ScoredAnswer]:
    """The answers to one question, likeliest first, with their ``probability``; ties keep their order."""
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
    """The cache of the prompts, with room for answers, and their next-token logits."""
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
    ends: Int[Array, " E"],
) -> Float[Array, "R T"]:
    """Log-probability of every token of R answers, each continuing its own prompt."""
    lm = merge(graphdef, params).lm
    positions = lengths[owners][:, None] + jnp.arange(tokens.shape[1] - 1)
    embedded = lm.embed(tokens[:, :-1], cache.dtype)
    hidden = lm(embedded, positions=positions, cache=cache.rows(owners)).hidden
    of = functools.partial(_logprob, ends=ends, table=lm.config.vocab_rows)
    rest = jax.lax.map(lambda one: of(lm.logits(one[0]), one[1]), (hidden, tokens[:, 1:]))
    return jnp.concatenate([of(first[owners], tokens[:, 0])[:, None], rest], axis=1)


def _logprob(
    logits: Float[Array, "N V"], tokens: Int[Array, " N"], *, ends: Int[Array, " E"], table: int
) -> Float[Array, " N"]:
    """Log-probabilities as for sampled tokens: ids without an embedding are excluded. The first end stands for all."""
    logprobs = jax.nn.log_softmax(logits[:, :table])
    taken = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return jnp.where(tokens == ends[0], jax.nn.logsumexp(logprobs[:, ends], axis=-1), taken)
