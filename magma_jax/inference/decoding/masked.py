"""Masked decoding: all tokens are predicted at once, several times, and ever more of them are kept.

``fill_image`` keeps every token that it revealed. ``fill_text`` may revise any token until the last step. Both are
loops inside one program. The number of steps, temperatures and filters are traced, so other values compile nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.sampling import SamplingRows, apply_temperature, filter_logits
from magma_jax.inference.decoding.schedules import (
    Remask,
    Schedule,
    Strategy,
    highest,
    remask_scores,
    remasked_count,
    reveal_scores,
    revealed_count,
)
from magma_jax.typing import Array, Bool, Float, Int, PRNGKey

# Tokens (B, S) and which of them are masked to fp32 logits (B, S, V).
Predict = Callable[[Any, Any], Any]

# Key, tempered and filtered logits (N, V), and temperatures (N,) to token ids (N,).
Draw = Callable[[Any, Any, Any], Any]


class ImageSteps(NamedTuple):
    """Traced settings of ``fill_image``; a temperature goes linearly from its first value to its last.

    The defaults are the original's. ``temperature`` divides the logits; ``noise`` is the factor of Gumbel noise in the
    choice of places (strategy multinomial-maskgit).
    """

    steps: Any = 10
    temperature: Any = (1.4, 0.6)
    noise: Any = (2.0, 0.2)


@dataclasses.dataclass(frozen=True)
class ImageRule:
    """Static settings of ``fill_image``."""

    strategy: Strategy = "multinomial-maskgit"
    schedule: Schedule = "cosine"


class Trace(NamedTuple):
    """Every step of a run, steps first; those beyond the run's number of steps are empty.

    For an image, ``masked`` are the places before the step, ``tokens`` the drawn tokens and ``scores`` their
    probabilities, both at all places. For a text, ``masked`` are the places that the step predicted; ``tokens`` and
    ``scores`` are the tokens and log-probabilities after it.
    """

    masked: Array  # (N, B, S)
    tokens: Array  # (N, B, S)
    scores: Array  # (N, B, S)


class Filled(NamedTuple):
    """Result of a loop: tokens (B, S); for a text, the log-probability of each when it was drawn; and the trace."""

    tokens: Array
    log_probs: Array | None
    trace: Trace | None


def draw_tokens(key: PRNGKey, logits: Float[Array, "N V"], temperature: Float[Array, " N"]) -> Int[Array, " N"]:
    """One token a row; the likeliest at temperature 0."""
    return jnp.where(temperature == 0, jnp.argmax(logits, -1), jax.random.categorical(key, logits)).astype(jnp.int32)


def fill_image(
    predict: Predict,
    tokens: Int[Array, "B S"],
    editable: Bool[Array, "B S"],
    key: PRNGKey,
    settings: ImageSteps,
    *,
    rule: ImageRule = ImageRule(),
    draw: Draw = draw_tokens,
    record: int = 0,
) -> Filled:
    """Fills in the editable tokens of every row; a revealed token is final.

    A row with fewer editable tokens than steps is done before the last step. Every step draws a token at each place,
    and reveals those with the highest score, see ``schedules``.

    Args:
        predict: see ``Predict``.
        tokens: token ids; those that are not editable are kept, the others have no effect.
        editable: places to fill in.
        key: random key.
        settings: traced settings.
        rule: static settings.
        draw: how a token is drawn, see ``Draw``.
        record: steps to return in the trace; 0 for no trace.
    """
    steps = jnp.asarray(settings.steps, jnp.int32)
    count = editable.sum(-1, dtype=jnp.int32)

    def body(step: Array, state: tuple) -> tuple:
        tokens, masked, trace = state
        token_key, place_key = jax.random.split(jax.random.fold_in(key, step))
        temperature = _between(settings.temperature, step, steps)
        logits = _rows(predict(tokens, masked))
        heat = jnp.full(len(logits), temperature)
        logits = apply_temperature(logits, heat)
        drawn = draw(token_key, logits, heat)
        confidence = _chosen(jax.nn.softmax(logits, -1), drawn).reshape(tokens.shape)
        drawn = drawn.reshape(tokens.shape)
        scores = reveal_scores(rule.strategy, confidence, _between(settings.noise, step, steps), place_key)
        number = revealed_count(rule.schedule, step, steps, count, masked.sum(-1, dtype=jnp.int32))
        revealed = highest(scores, masked, number)
        trace = _recorded(trace, step, masked, drawn, confidence)
        return jnp.where(revealed, drawn, tokens), masked & ~revealed, trace

    first = (tokens, editable, _empty(record, tokens))
    tokens, _, trace = jax.lax.fori_loop(0, steps, body, first)
    return Filled(tokens, None, trace)


def fill_text(
    predict: Predict,
    tokens: Int[Array, "B S"],
    editable: Bool[Array, "B S"],
    key: PRNGKey,
    steps: Int[Array, ""],
    sampling: SamplingRows,
    *,
    remask: Remask = "sample",
    draw: Draw = draw_tokens,
    record: int = 0,
) -> Filled:
    """Fills in the editable tokens of every row; each of them may be drawn again until the last step.

    The first step predicts all of them. Every later one masks some again (``remask``), linearly fewer from step to
    step, and predicts these. A token's log-probability is that of the filtered distribution that it was drawn from.

    Args:
        predict: see ``Predict``.
        tokens: token ids; those that are not editable are kept, the others have no effect.
        editable: places to fill in.
        key: random key.
        steps: number of steps.
        sampling: temperature and filters of every row; a repetition penalty has no effect.
        remask: static; see ``schedules.Remask``.
        draw: how a token is drawn, see ``Draw``.
        record: steps to return in the trace; 0 for no trace.
    """
    count = editable.sum(-1, dtype=jnp.int32)
    by_place = jax.tree.map(lambda values: jnp.repeat(values, tokens.shape[1]), sampling)

    def body(step: Array, state: tuple) -> tuple:
        tokens, log_probs, trace = state
        token_key, place_key = jax.random.split(jax.random.fold_in(key, step))
        scores = remask_scores(remask, log_probs, place_key)
        masked = highest(scores, editable, remasked_count(step, steps, count))
        logits = filter_logits(_rows(predict(tokens, masked)), by_place)
        drawn = draw(token_key, logits, by_place.temperature)
        chosen = _chosen(jax.nn.log_softmax(logits, -1), drawn).reshape(tokens.shape)
        tokens = jnp.where(masked, drawn.reshape(tokens.shape), tokens)
        log_probs = jnp.where(masked, chosen, log_probs)
        return tokens, log_probs, _recorded(trace, step, masked, tokens, log_probs)

    first = (tokens, jnp.zeros(tokens.shape), _empty(record, tokens))
    return Filled(*jax.lax.fori_loop(0, steps, body, first))


def _between(ends: Any, step: Array, steps: Array) -> Array:
    first, last = (jnp.asarray(end, jnp.float32) for end in ends)
    return first + (last - first) * step / jnp.maximum(steps - 1, 1)


def _rows(logits: Float[Array, "B S V"]) -> Float[Array, "N V"]:
    return logits.reshape(-1, logits.shape[-1])


def _chosen(values: Float[Array, "N V"], ids: Int[Array, " N"]) -> Float[Array, " N"]:
    return jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]


def _empty(record: int, tokens: Array) -> Trace | None:
    if not record:
        return None
    shape = (record, *tokens.shape)
    return Trace(jnp.zeros(shape, bool), jnp.zeros(shape, tokens.dtype), jnp.zeros(shape))


def _recorded(trace: Trace | None, step: Array, *values: Array) -> Trace | None:
    if trace is None:
        return None
    return Trace(*(buffer.at[step].set(value, mode="drop") for buffer, value in zip(trace, values, strict=True)))
