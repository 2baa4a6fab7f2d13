"""Beam search: the likeliest whole answers instead of the likeliest next tokens.

Every prompt has ``beams`` live hypotheses. A step extends each by every token and keeps the best; those that end in an
end of text move to the list of finished ones, which also keeps the best. A hypothesis has the score

    log-probability / length ** length_penalty

with the end of text counted in both, so 0 prefers short answers and 1 compares means. The search of a prompt ends when
no live hypothesis can exceed the finished ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.inference.batched import as_batch, check_room, pad_to_bucket
from magma_jax.inference.buckets import SEQUENCES
from magma_jax.inference.decoding.decode import is_end, run_prompts
from magma_jax.inference.decoding.sampling import MASKED, mask_missing_ids
from magma_jax.inference.generator import TokenGenerator
from magma_jax.inference.prompts import PromptBatch
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import Definition, merge
from magma_jax.nn.transformer.cache import KVCache
from magma_jax.runtime.compile import platform_jit
from magma_jax.typing import Array, Bool, Float, Int, Params


class Hypothesis(NamedTuple):
    """An answer found by beam search.

    Attributes:
        text: text up to the end of text.
        tokens: tokens without the end of text.
        logprob: log-probability of all tokens, including the end of text if ``finished``.
        score: log-probability with length penalty.
        finished: whether it has an end of text, as opposed to having reached the limit.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


class _Beams(NamedTuple):
    """W live hypotheses for each of B prompts, and W finished ones, best first."""

    cache: KVCache  # of B x W rows
    tokens: Array  # (B, W, T)
    logprob: Array  # (B, W)
    done: Array  # (B, W, T) finished hypotheses, padded with the end of text
    done_logprob: Array  # (B, W)
    done_score: Array  # (B, W), MASKED for empty entries
    done_length: Array  # (B, W), including the end of text
    over: Array  # (B,) whether the search of a prompt has ended


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
        model: any autoregressive text model.
        embeddings: from ``preprocess_inputs`` or ``preprocess_batch``.
        max_steps: maximum number of new tokens.
        beams: number of live hypotheses, at least ``n``.
        n: number of answers.
        length_penalty: 0 or more, see the module docstring.

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
        # One program serves all step counts up to the next declared length; the actual limit is data.
        steps=SEQUENCES.fit(max_steps),
        beams=beams,
        ends=model.tokenizer.end_ids,
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
    finished = ids[-1] in model.tokenizer.end_ids
    ids = ids[:-1] if finished else ids
    return Hypothesis(
        text=model.tokenizer.decode(ids),
        tokens=tuple(ids),
        logprob=float(logprob),
        score=float(score),
        finished=finished,
    )


@platform_jit(static_argnames=("graphdef", "steps", "beams", "ends"))
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
    ends: tuple[int, ...],
) -> _Beams:
    lm = merge(graphdef, params).lm
    batch, length, _ = embeddings.shape
    cache, logits = run_prompts(lm, embeddings, lengths, slots=length + steps)
    owners = jnp.repeat(jnp.arange(batch), beams)
    empty = jnp.full((batch, beams, steps), ends[0], jnp.int32)
    none = jnp.full((batch, beams), MASKED)
    state = _Beams(
        cache=cache.rows(owners),
        tokens=empty,
        # All beams start equal, so only the first one counts.
        logprob=none.at[:, 0].set(0),
        done=empty,
        done_logprob=none,
        done_score=none,
        done_length=jnp.zeros((batch, beams), jnp.int32),
        over=jnp.zeros(batch, bool),
    )
    state = _extend(lm, state, logits[owners], 0, penalty, limit, ends)

    def unfinished(carry):
        step, state = carry
        return (step < limit) & ~state.over.all()

    def body(carry):
        step, state = carry
        newest = jnp.take(state.tokens, step - 1, axis=2).reshape(-1)
        positions = (lengths[owners] + step - 1)[:, None]
        output = lm(lm.embed(newest[:, None], embeddings.dtype), positions=positions, cache=state.cache)
        state = state._replace(cache=output.cache)
        return step + 1, _extend(lm, state, lm.logits(output.hidden[:, 0]), step, penalty, limit, ends)

    step, state = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state))
    # Hypotheses still live at the limit compete with the finished ones.
    alive = jnp.where(state.over[:, None], MASKED, state.logprob)
    return _finish(state, state.tokens, alive, step, alive > MASKED, penalty)


def _extend(
    lm: Decoder,
    state: _Beams,
    logits: Float[Array, "R V"],
    step: int | Int[Array, ""],
    penalty: Float[Array, ""],
    limit: Int[Array, ""],
    ends: tuple[int, ...],
) -> _Beams:
    """Extends every live hypothesis by every token, and moves those that end to the finished ones."""
    batch, beams, _ = state.tokens.shape
    logprobs = jax.nn.log_softmax(mask_missing_ids(logits, lm.config.vocab_rows))
    vocabulary = logprobs.shape[-1]
    total = jnp.maximum(state.logprob[:, :, None] + logprobs.reshape(batch, beams, vocabulary), MASKED)
    # Each beam can end in as many ways as there are ends; if all of these are the best, enough others stay live.
    best, places = jax.lax.top_k(total.reshape(batch, -1), (1 + len(ends)) * beams)
    parents, sampled = places // vocabulary, places % vocabulary
    tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, step].set(sampled)
    ended = is_end(sampled, ends)
    state = _finish(state, tokens, best, step + 1, ended & (best > MASKED), penalty)
    logprob, kept = jax.lax.top_k(jnp.where(ended, MASKED, best), beams)
    parents = jnp.take_along_axis(parents, kept, axis=1)
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    # Upper bound of a live hypothesis's score: tokens of probability 1 from now on, at the most favourable length.
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
    """Adds the hypotheses ``which`` of N, all of one length, to the finished ones and keeps the best."""
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
