"""Scaled dot-product attention and its masks.

A mask is a boolean array that broadcasts to (B, S, T), true where a query may look. For a prompt of two picture
positions p and two words w, and with "prefix" giving the picture full sight of itself:

    causal     prefix     full
    p p w w    p p w w    p p w w
    1 0 0 0    1 1 0 0    1 1 1 1
    1 1 0 0    1 1 0 0    1 1 1 1
    1 1 1 0    1 1 1 0    1 1 1 1
    1 1 1 1    1 1 1 1    1 1 1 1
"""

import math

import jax
import jax.numpy as jnp

from magma_jax.typing import Array, Bool, Float, Int

# Finite, so that a row without any visible key gives finite (unused) numbers instead of NaN.
MASKED_SCORE = -1e30


def causal_mask(queries: Int[Array, "B S"], keys: Int[Array, "... T"]) -> Bool[Array, "B S T"]:
    """True where the position of the key is not after the position of the query."""
    return keys[..., None, :] <= queries[..., :, None]


def prefix_mask(
    queries: Int[Array, "B S"], keys: Int[Array, "... T"], prefix_length: Int[Array, " B"]
) -> Bool[Array, "B S T"]:
    """Causal, and every position sees the whole prefix of its row."""
    in_prefix = keys[..., None, :] < prefix_length[:, None, None]
    return causal_mask(queries, keys) | in_prefix


def same_segment(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where query and key belong to the same sample of a row that holds several."""
    return segments[:, :, None] == segments[:, None, :]


def dot_product_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T K"],
    mask: Bool[Array, "#B #S T"] | None,
    *,
    scaled: bool = True,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S T"]]:
    """Returns the weighted values and the attention weights; scores and softmax are fp32.

    Keys and values have their heads first, as a cache holds them: what a head reads lies together.
    ``mask=None`` lets every query see every key; ``scaled`` divides the scores by sqrt(K). Weights that nobody uses are
    removed by the compiler.
    """
    scores = jnp.einsum("bshk,bhtk->bhst", q, k, preferred_element_type=jnp.float32)
    if scaled:
        scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhst,bhtk->bshk", weights.astype(v.dtype), v), weights
