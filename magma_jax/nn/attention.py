"""Scaled dot-product attention: the plain form, or a kernel that stores no scores (``nn.fused``).

Kernels are used for long sequences only: on short ones they save memory but cost time, and only the plain form returns
the weights.
"""

import math

import jax
import jax.numpy as jnp

from magma_jax.nn.fused import Kernel, choose_kernel, fused_attention
from magma_jax.nn.layers import dropout
from magma_jax.nn.masks import MASKED_SCORE, Mask
from magma_jax.typing import Array, Float, PRNGKey

# Fewest queries for which each kernel is used; a single query has few scores.
FROM_QUERIES: dict[Kernel, int] = {"cudnn": 2, "splash": 512, "blockwise": 1024}


def dot_product_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T K"],
    mask: Mask,
    *,
    score_divisor: float | None = None,
    score_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    weights: bool = False,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S T"] | None]:
    """Returns the weighted values, and the attention weights if ``weights``; scores and softmax are fp32.

    Keys and values are head-first, as in the cache, so that the memory of one head is contiguous. H query heads share
    G key/value heads, H / G each. Dropout and capped scores use the plain form.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: which keys each query sees.
        score_divisor: divisor of the scores; None for sqrt(K).
        score_cap: soft limit of the scores, ``cap * tanh(score / cap)``; None for no limit.
        dropout_rate: dropout rate of the weights.
        dropout_key: None for no dropout.
        weights: whether to return the weights (before dropout).
    """
    divisor = math.sqrt(q.shape[-1]) if score_divisor is None else score_divisor
    drops = dropout_key is not None and dropout_rate > 0
    if not (weights or drops or score_cap) and (kernel := _kernel(q, k, mask)):
        return fused_attention(q, k, v, mask, scale=1 / divisor, kernel=kernel), None
    found = _weights(q, k, mask, divisor, score_cap)
    used = dropout(found, dropout_rate, dropout_key)
    out = jnp.einsum("bhst,bhtk->bshk", used.astype(v.dtype), _for_queries(v, q.shape[2]))
    return out, found if weights else None


def _kernel(q: Array, k: Array, mask: Mask) -> Kernel | None:
    if q.shape[1] < min(FROM_QUERIES.values()):
        return None
    kernel = choose_kernel(q, k, mask)
    return kernel if q.shape[1] >= FROM_QUERIES[kernel] else None


def _weights(q: Array, k: Array, mask: Mask, divisor: float, cap: float | None) -> Array:
    scores = jnp.einsum("bshk,bhtk->bhst", q, _for_queries(k, q.shape[2]), preferred_element_type=jnp.float32)
    if divisor != 1:
        scores = scores / divisor
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if mask.hides:
        scores = jnp.where(mask.dense(q.shape[1], k.shape[2])[:, None], scores, MASKED_SCORE)
    return jax.nn.softmax(scores, axis=-1)


def _for_queries(x: Array, heads: int) -> Array:
    """Keys or values repeated for every query head."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)
