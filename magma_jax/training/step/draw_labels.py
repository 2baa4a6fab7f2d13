"""Tokens drawn from a model's guesses during training, without holding the logits of a whole batch."""

import jax
import jax.numpy as jnp

from magma_jax.training.step.cross_entropy import LOGIT_BYTES, Project, stretches_of
from magma_jax.typing import Array, Float, Int, Key


def draw_labels(
    project: Project, hidden: Float[Array, "B S D"], keys: Key[Array, " B"], *, logit_bytes: int = LOGIT_BYTES
) -> Int[Array, "B S"]:
    """One token a position, drawn from the softmax of its logits; gradients do not pass.

    A row's draws follow from its key alone: one uniform number a position, looked up in the cumulative distribution.

    Args:
        project: hidden states to fp32 logits, of any chunk of the sequence.
        hidden: final hidden states.
        keys: random key of each row.
        logit_bytes: limit of the logits per device at a time.
    """
    batch, length, _ = hidden.shape
    hidden = jax.lax.stop_gradient(hidden)
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    stretches, stretch = stretches_of(project, hidden, logit_bytes)
    padding = stretches * stretch - length

    def chunks(array: Array) -> Array:
        array = jnp.pad(array, ((0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)))
        return array.reshape(batch, stretches, stretch, *array.shape[2:]).swapaxes(0, 1)

    def draw(_, inputs):
        hidden, numbers = inputs
        mass = jnp.cumsum(jax.nn.softmax(project(hidden), -1), -1)
        below = mass <= numbers[..., None] * mass[..., -1:]
        return None, jnp.minimum(below.sum(-1, dtype=jnp.int32), mass.shape[-1] - 1)

    _, drawn = jax.lax.scan(draw, None, (chunks(hidden), chunks(numbers)))
    drawn = drawn.swapaxes(0, 1).reshape(batch, -1)[:, :length]
    return jax.lax.stop_gradient(drawn)
