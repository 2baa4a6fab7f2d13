"""Scaled dot-product attention: with all its scores, or by a kernel that stores none (``nn.fused``).

A kernel is taken for long sequences alone: below, what it saves in memory it costs in time, and the plain form gives
the weights too.
"""

import math

import jax
import jax.numpy as jnp

from magma_jax.nn.fused import Kernel, choose_kernel, fused_attention
from magma_jax.nn.layers import dropout
from magma_jax.nn.masks import MASKED_SCORE, Mask
from magma_jax.typing import Array, Float, PRNGKey

# Queries from which on each kernel is taken; one query alone has few scores.
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
    """Returns the weighted values, and the attention weights if they are asked for; scores and softmax are fp32.

    Keys and values have their heads first, as a cache holds them: what a head reads lies together. H heads of queries
    share G heads of keys and values, H / G each. Dropped weights and capped scores take the plain form.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: which keys a query sees.
        score_divisor: what scores are divided by; None for sqrt(K).
        score_cap: scores are limited to it by ``cap * tanh(score / cap)``; None for no limit.
        dropout_rate: of the weights.
        dropout_key: None for no dropout.
        weights: whether to return the weights, as they are before dropout.
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
    """Keys or values once for each head of the queries."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)
