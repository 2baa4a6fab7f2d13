"""Next-token loss."""

import jax
import jax.numpy as jnp
import optax

from magma_jax.typing import Array, Float, Int

# Marks positions that carry no loss (PyTorch's convention, which the original's labels follow).
IGNORED = -100


def caption_labels(tokens: Int[Array, "B S"], eos_id: int) -> Int[Array, "B S"]:
    """Labels of captions: the tokens up to and including the first eos, ``IGNORED`` behind it (original)."""
    ends = jnp.cumsum(tokens == eos_id, axis=1)
    behind_first_eos = (ends - (tokens == eos_id)) > 0
    return jnp.where(behind_first_eos, IGNORED, tokens)


def cross_entropy(logits: Float[Array, "B S V"], labels: Int[Array, "B S"]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the loss over the labels that are not ``IGNORED``, and their number.

    Returning both lets devices and accumulation steps form one token-weighted mean instead of a mean of means.
    """
    counted = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    return jnp.where(counted, losses, 0.0).sum(), counted.sum()


def accuracy(logits: Float[Array, "B S V"], labels: Int[Array, "B S"]) -> Float[Array, ""]:
    """Number of counted labels that are the most likely token."""
    return jnp.sum((jax.lax.stop_gradient(logits).argmax(-1) == labels) & (labels != IGNORED))
