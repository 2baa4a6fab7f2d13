"""Beam search: the likeliest whole answers instead of the likeliest next tokens.

Of every prompt ``beams`` beginnings are kept. A step continues each by every token and keeps the best; those that drew
the end of text leave for the list of finished ones, of which again the best are kept. A hypothesis is measured by

    log-probability / length ** length_penalty

with the end of text counted in both, so 0 prefers short answers and 1 compares means. The search of a prompt ends when
no living beginning can become better than the finished ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.inference.batched import as_batch, check_room, pad_to_bucket
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.decoding.decode import run_prompts
from magma_jax.inference.decoding.sampling import MASKED, mask_missing_ids
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import PromptBatch
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Bool, Float, Int, Params


class Hypothesis(NamedTuple):
    """An answer that a search found.

    Attributes:
        text: up to the end of text.
        tokens: the same, without the end of text.
        logprob: of all tokens, the end of text included if ``finished``.
        score: what it was compared by.
        finished: whether the end of text was sampled, or there was no room for more.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


class _Beams(NamedTuple):
    """W beginnings of each of B prompts, and W finished hypotheses, best first."""

    cache: KVCache  # of B x W rows
    tokens: Array  # (B, W, T)
    logprob: Array  # (B, W)
    done: Array  # (B, W, T) finished ones, the end of text behind them
    done_logprob: Array  # (B, W)
    done_score: Array  # (B, W), MASKED where there is none
    done_length: Array  # (B, W), with the end of text
    over: Array  # (B,) nothing can change any more


def beam_search(
    model: TokenGenerator,
    embeddings: Float[Array, "B S D"] | PromptBatch,
    max_steps: int,
    *,
    beams: int = 4,
    n: int = 1,
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """The ``n`` best answers to every prompt, best first.

    Args:
        model: any.
        embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
        max_steps: new tokens at most.
        beams: beginnings that are kept, at least ``n``.
        n: answers wanted.
        length_penalty: 0 or more, see the module.

    Raises:
        ValueError: prompt and new tokens exceed the context, or a number out of range.
    """
    if not 1 <= n <= beams:
        raise ValueError(f"n must lie between 1 and beams ({beams}), got {n}")
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty must be 0 or positive and finite, got {length_penalty}")
    batch = as_batch(embeddings)
    check_room(model, batch, max_steps)
    state = _search(
        model.graphdef,
        model.params,
        pad_to_bucket(batch.embeddings),
        batch.lengths,
        jnp.float32(length_penalty),
        jnp.int32(max_steps),
        # One program for all numbers up to the next declared length; where to stop is data.
        steps=SEQUENCES.fit(max_steps),
        beams=beams,
        eos_id=model.tokenizer.eos_id,
    )
    tokens, logprobs, scores, lengths = (
        np.asarray(array) for array in (state.done, state.done_logprob, state.done_score, state.done_length)
    )
    return [
        [
            _hypothesis(model, tokens[row, i, : lengths[row, i]], logprobs[row, i], scores[row, i])
            for i in range(n)
            if scores[row, i] > MASKED
        ]
        for row in range(len(tokens))
    ]


def _hypothesis(model: TokenGenerator, tokens: Int[np.ndarray, " T"], logprob: float, score: float) -> Hypothesis:
    ids = tokens.tolist()
    finished = ids[-1] == model.tokenizer.eos_id
    ids = ids[:-1] if finished else ids
    return Hypothesis(
        text=model.tokenizer.decode(ids),
        tokens=tuple(ids),
        logprob=float(logprob),
        score=float(score),
        finished=finished,
    )


@platform_jit(static_argnames=("graphdef", "steps", "beams", "eos_id"))
def _search(
    graphdef: Definition,
    params: Params,
    embeddings: Float[Array, "B S D"],
    lengths: Int[Array, " B"],
    penalty: Float[Array, ""],
    limit: Int[Array, ""],
    *,
    steps: int,
    beams: int,
    eos_id: int,
) -> _Beams:
    lm = merge(graphdef, params).lm
    batch, length, _ = embeddings.shape
    cache, logits = run_prompts(lm, embeddings, lengths, slots=length + steps)
    owners = jnp.repeat(jnp.arange(batch), beams)
    empty = jnp.full((batch, beams, steps), eos_id, jnp.int32)
    none = jnp.full((batch, beams), MASKED)
    state = _Beams(
        cache=cache.rows(owners),
        tokens=empty,
        # All beams begin alike, so that one alone counts.
        logprob=none.at[:, 0].set(0),
        done=empty,
        done_logprob=none,
        done_score=none,
        done_length=jnp.zeros((batch, beams), jnp.int32),
        over=jnp.zeros(batch, bool),
    )
    state = _extend(lm, state, logits[owners], 0, penalty, limit, eos_id)

    def unfinished(carry):
        step, state = carry
        return (step < limit) & ~state.over.all()

    def body(carry):
        step, state = carry
        newest = jnp.take(state.tokens, step - 1, axis=2).reshape(-1)
        positions = (lengths[owners] + step - 1)[:, None]
        output = lm(lm.embed(newest[:, None], embeddings.dtype), positions=positions, cache=state.cache)
        state = state._replace(cache=output.cache)
        return step + 1, _extend(lm, state, lm.logits(output.hidden[:, 0]), step, penalty, limit, eos_id)

    step, state = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state))
    # What is alive at the end has no room for more, and competes as it is.
    alive = jnp.where(state.over[:, None], MASKED, state.logprob)
    return _finish(state, state.tokens, alive, step, alive > MASKED, penalty)


def _extend(
    lm: Decoder,
    state: _Beams,
    logits: Float[Array, "R V"],
    step: int | Int[Array, ""],
    penalty: Float[Array, ""],
    limit: Int[Array, ""],
    eos_id: int,
) -> _Beams:
    """Continues every beginning by every token: finished ones join the finished, the best others live on."""
    batch, beams, _ = state.tokens.shape
    logprobs = jax.nn.log_softmax(mask_missing_ids(logits, lm.config.vocab_rows))
    vocabulary = logprobs.shape[-1]
    total = jnp.maximum(state.logprob[:, :, None] + logprobs.reshape(batch, beams, vocabulary), MASKED)
    # Twice as many as beams: even if half of them end, enough live on.
    best, places = jax.lax.top_k(total.reshape(batch, -1), 2 * beams)
    parents, sampled = places // vocabulary, places % vocabulary
    tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, step].set(sampled)
    ended = sampled == eos_id
    state = _finish(state, tokens, best, step + 1, ended & (best > MASKED), penalty)
    logprob, kept = jax.lax.top_k(jnp.where(ended, MASKED, best), beams)
    parents = jnp.take_along_axis(parents, kept, axis=1)
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    # The measure of a beginning that drew certain tokens only from now on, at the best length for it.
    bound = logprob[:, 0] / limit.astype(jnp.float32) ** penalty
    over = state.over | (bound <= state.done_score[:, -1]) | (logprob[:, 0] <= MASKED)
    return state._replace(
        cache=state.cache.rows(rows),
        tokens=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
        logprob=logprob,
        over=over,
    )


def _finish(
    state: _Beams,
    tokens: Int[Array, "B N T"],
    logprob: Float[Array, "B N"],
    length: int | Int[Array, ""],
    which: Bool[Array, "B N"],
    penalty: Float[Array, ""],
) -> _Beams:
    """Lets some of N hypotheses of one length join the finished, of which the best stay."""
    score = jnp.where(which & ~state.over[:, None], logprob / jnp.float32(length) ** penalty, MASKED)
    scores = jnp.concatenate([state.done_score, score], axis=1)
    lengths = jnp.concatenate([state.done_length, jnp.full(score.shape, length, jnp.int32)], axis=1)
    best, kept = jax.lax.top_k(scores, state.done.shape[1])
    everything = jnp.concatenate([state.done, tokens], axis=1)
    return state._replace(
        done=jnp.take_along_axis(everything, kept[:, :, None], axis=1),
        done_logprob=jnp.take_along_axis(jnp.concatenate([state.done_logprob, logprob], axis=1), kept, axis=1),
        done_score=best,
        done_length=jnp.take_along_axis(lengths, kept, axis=1),
    )
