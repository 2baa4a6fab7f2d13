"""Masked decoding: all tokens are predicted at once, several times, and ever more of them are kept.

``fill_image`` keeps every token that it revealed. ``fill_text`` may revise any token until the last step. Both are
loops inside one program. The number of steps, temperatures and filters are traced, so other values compile nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.sampling import SamplingRows, apply_temperature, filter_logits, top_p
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
from magma_jax.typing import Array, Bool, Float, Int, Key, PRNGKey

# Tokens (B, S) and which of them are masked to fp32 logits (B, S, V).
Predict = Callable[[Any, Any], Any]

# Key of a row, its tempered and filtered logits (S, V), and temperatures (S,) to token ids (S,).
Draw = Callable[[Any, Any, Any], Any]


class ImageSteps(NamedTuple):
    """Traced settings of ``fill_image``; a temperature goes linearly from its first value to its last.

    The defaults are the original's. ``temperature`` divides the logits; ``noise`` is the factor of Gumbel noise in the
    choice of places (strategy multinomial-maskgit); ``top_p`` is the mass of the likeliest tokens that are drawn from.
    """

    steps: Any = 10
    temperature: Any = (1.4, 0.6)
    noise: Any = (2.0, 0.2)
    top_p: Any = 1.0


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

    masked: Any  # (N, B, S)
    tokens: Any  # (N, B, S)
    scores: Any  # (N, B, S)


class Filled(NamedTuple):
    """Result of a loop: tokens (B, S), the log-probability of each when it was drawn (B, S), and the trace.

    Kept tokens have log-probability 0.
    """

    tokens: Array
    log_probs: Array
    trace: Trace | None


class Canvas(NamedTuple):
    """State between the steps of ``fill_image``, (B, S) each."""

    tokens: Any
    masked: Any
    log_probs: Any


class Text(NamedTuple):
    """State between the steps of ``fill_text``, (B, S) each."""

    tokens: Array
    log_probs: Array


def draw_tokens(key: PRNGKey, logits: Float[Array, "S V"], temperature: Float[Array, " S"]) -> Int[Array, " S"]:
    """One token a position; the likeliest at temperature 0."""
    return jnp.where(temperature == 0, jnp.argmax(logits, -1), jax.random.categorical(key, logits)).astype(jnp.int32)


def fill_image(
    predict: Predict,
    tokens: Int[Array, "B S"],
    editable: Bool[Array, "B S"],
    keys: Key[Array, " B"],
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
        keys: random key of each row; what is drawn for a row depends on no other.
        settings: traced settings.
        rule: static settings.
        draw: how a token is drawn, see ``Draw``.
        record: steps to return in the trace; 0 for no trace.
    """
    steps = jnp.asarray(settings.steps, jnp.int32)

    def body(step: Array, state: tuple) -> tuple:
        canvas, trace = state
        new, drawn, confidence = image_step(predict, canvas, editable, step, keys, settings, rule=rule, draw=draw)
        return new, _recorded(trace, step, canvas.masked, drawn, confidence)

    first = (Canvas(tokens, editable, jnp.zeros(tokens.shape)), _empty(record, tokens))
    canvas, trace = jax.lax.fori_loop(0, steps, body, first)
    return Filled(canvas.tokens, canvas.log_probs, trace)


def image_step(
    predict: Predict,
    canvas: Canvas,
    editable: Bool[Array, "B S"],
    step: Int[Array, ""],
    keys: Key[Array, " B"],
    settings: ImageSteps,
    *,
    rule: ImageRule = ImageRule(),
    draw: Draw = draw_tokens,
) -> tuple[Canvas, Int[Array, "B S"], Float[Array, "B S"]]:
    """One step of ``fill_image``: the canvas after it, and the token drawn at each place with its probability."""
    steps = jnp.asarray(settings.steps, jnp.int32)
    tokens, masked = canvas.tokens, canvas.masked
    token_keys, place_keys = _step_keys(keys, step)
    logits = predict(tokens, masked)
    heat = jnp.full(tokens.shape, _between(settings.temperature, step, steps))
    shape = logits.shape
    logits = apply_temperature(logits.reshape(-1, shape[-1]), heat.reshape(-1))
    mass = jnp.full(len(logits), settings.top_p, jnp.float32)
    # Sorting the codes takes longer than a small model's step.
    logits = jax.lax.cond(mass[0] < 1, lambda: top_p(logits, mass), lambda: logits).reshape(shape)
    drawn = jax.vmap(draw)(token_keys, logits, heat)
    confidence = _chosen(jax.nn.softmax(logits, -1), drawn)
    noise = _between(settings.noise, step, steps)
    scores = jax.vmap(lambda row, key: reveal_scores(rule.strategy, row[None], noise, key)[0])(confidence, place_keys)
    left = masked.sum(-1, dtype=jnp.int32)
    number = revealed_count(rule.schedule, step, steps, editable.sum(-1, dtype=jnp.int32), left)
    revealed = highest(scores, masked, number)
    canvas = Canvas(
        jnp.where(revealed, drawn, tokens),
        masked & ~revealed,
        jnp.where(revealed, jnp.log(confidence), canvas.log_probs),
    )
    return canvas, drawn, confidence


def fill_text(
    predict: Predict,
    tokens: Int[Array, "B S"],
    editable: Bool[Array, "B S"],
    keys: Key[Array, " B"],
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
        keys: random key of each row; what is drawn for a row depends on no other.
        steps: number of steps.
        sampling: temperature and filters of every row; a repetition penalty has no effect.
        remask: static; see ``schedules.Remask``.
        draw: how a token is drawn, see ``Draw``.
        record: steps to return in the trace; 0 for no trace.
    """

    def body(step: Array, state: tuple) -> tuple:
        text, trace = state
        masked = remasked(text, editable, step, keys, steps, remask=remask)
        text = text_step(predict, text, masked, step, keys, sampling, draw=draw)
        return text, _recorded(trace, step, masked, text.tokens, text.log_probs)

    first = (Text(tokens, jnp.zeros(tokens.shape)), _empty(record, tokens))
    text, trace = jax.lax.fori_loop(0, steps, body, first)
    return Filled(text.tokens, text.log_probs, trace)


def remasked(
    text: Text,
    editable: Bool[Array, "B S"],
    step: Int[Array, ""],
    keys: Key[Array, " B"],
    steps: Int[Array, ""],
    *,
    remask: Remask = "sample",
) -> Bool[Array, "B S"]:
    """The tokens that a step of ``fill_text`` masks and predicts."""
    scores = jax.vmap(lambda row, key: remask_scores(remask, row[None], key)[0])(
        text.log_probs, _step_keys(keys, step)[1]
    )
    return highest(scores, editable, remasked_count(step, steps, editable.sum(-1, dtype=jnp.int32)))


def text_step(
    predict: Predict,
    text: Text,
    masked: Bool[Array, "B S"],
    step: Int[Array, ""],
    keys: Key[Array, " B"],
    sampling: SamplingRows,
    *,
    draw: Draw = draw_tokens,
) -> Text:
    """One step of ``fill_text``: draws the masked tokens."""
    shape = text.tokens.shape
    by_place = jax.tree.map(lambda values: jnp.repeat(values, shape[1]), sampling)
    logits = predict(text.tokens, masked)
    logits = filter_logits(logits.reshape(-1, logits.shape[-1]), by_place).reshape(logits.shape)
    heat = jnp.broadcast_to(sampling.temperature[:, None], shape)
    drawn = jax.vmap(draw)(_step_keys(keys, step)[0], logits, heat)
    chosen = _chosen(jax.nn.log_softmax(logits, -1), drawn)
    return Text(jnp.where(masked, drawn, text.tokens), jnp.where(masked, chosen, text.log_probs))


def _step_keys(keys: Array, step: Array) -> tuple[Array, Array]:
    """Keys of each row for the tokens and for the places of a step."""
    pairs = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, step)))(keys)
    return pairs[:, 0], pairs[:, 1]


def _between(ends: Any, step: Array, steps: Array) -> Array:
    first, last = (jnp.asarray(end, jnp.float32) for end in ends)
    return first + (last - first) * step / jnp.maximum(steps - 1, 1)


def _chosen(values: Float[Array, "B S V"], ids: Int[Array, "B S"]) -> Float[Array, "B S"]:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _empty(record: int, tokens: Array) -> Trace | None:
    if not record:
        return None
    shape = (record, *tokens.shape)
    return Trace(jnp.zeros(shape, bool), jnp.zeros(shape, tokens.dtype), jnp.zeros(shape))


def _recorded(trace: Trace | None, step: Array, *values: Array) -> Trace | None:
    if trace is None:
        return None
    return Trace(*(buffer.at[step].set(value, mode="drop") for buffer, value in zip(trace, values, strict=True)))
