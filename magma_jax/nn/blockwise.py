"""Blockwise attention: the full score matrix is never held, in plain JAX for every device.

Blocks of keys are processed in turn, with running maxima and sums (Milakov and Gimelshein, 2018; Rabe and Staats, 2021;
Dao et al., 2022). The backward pass recomputes each block of scores from the log-sum-exp, so memory is linear in the
sequence length.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.nn.masks import MASKED_SCORE, Mask
from magma_jax.typing import Array, Float

# Keys per block. One block of scores is as large as queries with 512 features per head.
BLOCK = 512


def blockwise_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T K"],
    mask: Mask,
    *,
    scale: float,
    block: int = BLOCK,
) -> Float[Array, "B S H K"]:
    """Weighted values; H query heads share G key/value heads, H / G each.

    Scores and softmax are fp32. ``block`` affects only memory and rounding.
    """
    batch, length, heads, size = q.shape
    groups = k.shape[1]
    grouped = q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    out: Any = _attention(grouped, k, v, mask, scale, min(block, k.shape[2]))
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, mask: Mask, scale: float, block: int) -> Array:
    """Queries (B, G, R, S, K); the result has their shape."""
    return _forward(q, k, v, mask, scale, block)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, scale: float, block: int) -> tuple[Array, Any]:
    shape = q.shape[:-1]

    def step(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple[Array, Array, Array], None]:
        largest, total, out = carry
        keys, values, seen = _block(k, v, mask, q.shape[3], start, block)
        scores = _scores(q, keys, seen, scale)
        new = jnp.maximum(largest, scores.max(-1))
        weights = jnp.exp(scores - new[..., None])
        shrink = jnp.exp(largest - new)
        total = total * shrink + weights.sum(-1)
        added = jnp.einsum("bgrst,bgtk->bgrsk", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return (new, total, out * shrink[..., None] + added), None

    first = (jnp.full(shape, MASKED_SCORE, jnp.float32), jnp.zeros(shape, jnp.float32))
    carry = (*first, jnp.zeros(q.shape, jnp.float32))
    (largest, total, out), _ = jax.lax.scan(step, carry, _starts(k, block))
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, out, largest + jnp.log(total))


def _backward(scale: float, block: int, residuals: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, log_total = residuals
    gradient = gradient.astype(v.dtype)
    # Gradient through the softmax's normalisation, the same for all keys of a query.
    offset = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def step(dq: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        keys, values, seen = _block(k, v, mask, q.shape[3], start, block)
        weights = jnp.exp(_scores(q, keys, seen, scale) - log_total[..., None])
        options = {"preferred_element_type": jnp.float32}
        dv = jnp.einsum("bgrst,bgrsk->bgtk", weights.astype(v.dtype), gradient, **options)
        dweights = jnp.einsum("bgrsk,bgtk->bgrst", gradient, values, **options)
        dscores = (weights * (dweights - offset[..., None]) * scale).astype(q.dtype)
        dq = dq + jnp.einsum("bgrst,bgtk->bgrsk", dscores, keys, **options)
        dk = jnp.einsum("bgrst,bgrsk->bgtk", dscores, q, **options)
        return dq, (dk, dv)

    dq, blocks = jax.lax.scan(step, jnp.zeros(q.shape, jnp.float32), _starts(k, block))
    dk, dv = (_joined(parts, k.shape).astype(k.dtype) for parts in blocks)
    return dq.astype(q.dtype), dk, dv, None


_attention.defvjp(_forward, _backward)


def _starts(k: Array, block: int) -> Array:
    return jnp.arange(math.ceil(k.shape[2] / block)) * block


def _block(k: Array, v: Array, mask: Mask, queries: int, start: Array, block: int) -> tuple[Array, Array, Array]:
    """Keys, values and mask of one block; places past the last key repeat it and are masked."""
    keys = start + jnp.arange(block)
    inside = keys < k.shape[2]
    keys = jnp.minimum(keys, k.shape[2] - 1)
    seen = mask.visible(jnp.arange(queries), keys) & inside
    return k[:, :, keys], v[:, :, keys], seen


def _scores(q: Array, k: Array, seen: Array, scale: float) -> Array:
    scores = jnp.einsum("bgrsk,bgtk->bgrst", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(seen[:, None, None], scores, MASKED_SCORE)


def _joined(parts: Array, shape: tuple[int, ...]) -> Array:
    """Blocks (N, B, G, t, K) as (B, G, T, K); the last block's padding is zero and is cut off."""
    batch, groups, length, size = shape
    return parts.transpose(1, 2, 0, 3, 4).reshape(batch, groups, -1, size)[:, :, :length]
