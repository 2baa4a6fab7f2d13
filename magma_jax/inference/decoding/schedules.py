"""Schedules of masked decoding: how many tokens are still masked after a step, and which ones are revealed or masked.

All of them take traced numbers, so that another number of steps or another temperature compiles nothing.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.typing import Array, Bool, Float, Int, PRNGKey

# cosine: cos(pi r / 2). linear: 1 - r. arccos: arccos(r) / (pi / 2) (Chang et al. 2022; Besnier and Chen 2023).
Schedule = Literal["cosine", "linear", "arccos"]

# Which masked tokens are revealed. maskgit: the most confident. multinomial-maskgit: likewise, with Gumbel noise on the
# logarithms of the confidences. multinomial: drawn in proportion to their confidences. random: any. halton: in the
# order of Halton's sequence on the grid, so that early tokens are far apart (Besnier et al. 2025).
Strategy = Literal["multinomial-maskgit", "maskgit", "multinomial", "random", "halton"]

# Which tokens are masked again. topk: the least likely. sample: drawn, in proportion to the softmax of their negative
# log-probabilities.
Remask = Literal["topk", "sample"]

# Smallest confidence of the two strategies that draw; the original's, which is the epsilon of fp16.
EPSILON = 2.0**-10
# Products that are integers but for rounding are not rounded up: fp32's cos(pi / 3) is above or below 1/2 by platform.
SLACK = 1e-4


def mask_ratio(schedule: Schedule, r: Float[Array, "..."]) -> Float[Array, "..."]:
    """Share of tokens that are masked when a share ``r`` of the steps is done; it falls from 1 to 0."""
    if schedule == "cosine":
        return jnp.cos(0.5 * jnp.pi * r)
    if schedule == "linear":
        return 1 - r
    if schedule == "arccos":
        return jnp.arccos(r) / (0.5 * jnp.pi)
    raise ValueError(f"schedule {schedule!r} is none of cosine, linear, arccos")


def masked_count(ratio: Float[Array, "..."], count: Int[Array, "..."]) -> Int[Array, "..."]:
    """That share of ``count``, rounded up."""
    return jnp.ceil(ratio * count - SLACK).astype(jnp.int32)


def revealed_count(
    schedule: Schedule, step: Int[Array, ""], steps: Int[Array, ""], count: Int[Array, " B"], masked: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Number of tokens that a step reveals: at least one while any is masked, and in the last step all.

    Args:
        schedule: see ``Schedule``.
        step: number of the step, from 0.
        steps: number of steps.
        count: tokens that were masked before the first step.
        masked: tokens that are masked now. The original fails where they are used up before the last step.
    """
    after = masked_count(mask_ratio(schedule, (step + 1) / steps), count)
    revealed = jnp.maximum(masked - jnp.clip(after, 0, masked), 1)
    # Not by the ratio, which may round to a little more than 0.
    return jnp.where(step + 1 >= steps, masked, jnp.minimum(revealed, masked))


def remasked_count(step: Int[Array, ""], steps: Int[Array, ""], count: Int[Array, " B"]) -> Int[Array, " B"]:
    """Number of tokens that a step of text decoding predicts: all at first, then linearly fewer, at least one."""
    return jnp.clip(count * (steps - step) // steps, 1, count)


def reveal_scores(
    strategy: Strategy, confidence: Float[Array, "B S"], temperature: Float[Array, ""], key: PRNGKey
) -> Float[Array, "B S"]:
    """Scores whose highest are revealed.

    Args:
        strategy: see ``Strategy``.
        confidence: probability of the token drawn at each position.
        temperature: factor of the noise of multinomial-maskgit.
        key: random key; maskgit and halton ignore it.
    """
    if strategy == "maskgit":
        return confidence
    if strategy == "halton":
        return jnp.broadcast_to(-jnp.asarray(halton_ranks(confidence.shape[-1]), jnp.float32), confidence.shape)
    if strategy == "random":
        return jax.random.uniform(key, confidence.shape)
    noise = jax.random.gumbel(key, confidence.shape)
    if strategy == "multinomial-maskgit":
        return jnp.log(jnp.clip(confidence, EPSILON, 1)) + temperature * noise
    if strategy == "multinomial":
        # The highest of these are a sample without replacement.
        return jnp.log(confidence + EPSILON) + noise
    raise ValueError(f"strategy {strategy!r} is none of multinomial-maskgit, maskgit, multinomial, random, halton")


def remask_scores(remask: Remask, log_probs: Float[Array, "B S"], key: PRNGKey) -> Float[Array, "B S"]:
    """Scores whose highest are masked again."""
    if remask == "topk":
        return -log_probs
    if remask == "sample":
        # A softmax differs from its argument by a constant, which changes no order.
        return jax.random.gumbel(key, log_probs.shape) - log_probs
    raise ValueError(f"remask {remask!r} is none of topk, sample")


def highest(scores: Float[Array, "B S"], among: Bool[Array, "B S"], count: Int[Array, " B"]) -> Bool[Array, "B S"]:
    """The ``count`` highest scores of each row among some positions; of equal ones the first."""
    order = jnp.argsort(jnp.where(among, scores, -jnp.inf), axis=-1, descending=True, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count[:, None]) & among


@functools.cache
def halton_ranks(positions: int) -> Int[np.ndarray, " S"]:
    """Rank of each position of a square grid, row by row, in the order in which Halton's sequence meets its cells.

    Raises:
        ValueError: the positions are no square.
    """
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"Halton's order needs a square of positions, not {positions}")
    ranks = np.full(positions, -1, np.int32)
    found = number = 0
    while found < positions:
        number += 1
        place = math.floor(_radical(number, 2) * side) * side + math.floor(_radical(number, 3) * side)
        if ranks[place] < 0:
            ranks[place] = found
            found += 1
    return ranks


def _radical(number: int, base: int) -> float:
    """The digits of a number behind the point, in reverse."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        value += digit * share
    return value
