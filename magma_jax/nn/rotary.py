"""Rotary position embedding.

The first ``rotary_dim`` features of each head are pairs, and pair i is turned by the angle
``position / base**(2i / rotary_dim)``. Pairs are neighbours, (0,1), (2,3), ... (GPT-J), or a feature of the first half
and its counterpart in the second (GPT-NeoX). Angles, sines and cosines are fp32: bf16 cannot represent position 257.
"""

import jax.numpy as jnp

from magma_jax.typing import Array, Float, Int


def rotary_table(
    positions: Int[Array, "B S"], rotary_dim: int, base: float = 10_000.0
) -> tuple[Float[Array, "B S R"], Float[Array, "B S R"]]:
    """Sines and cosines of every position; R = rotary_dim / 2."""
    frequencies = 1.0 / base ** (jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def apply_rotary(
    x: Float[Array, "B S H K"], sin: Float[Array, "B S R"], cos: Float[Array, "B S R"], *, interleaved: bool = True
) -> Float[Array, "B S H K"]:
    """Turns the first 2R features of each head, neighbours if ``interleaved``; the rest pass unchanged."""
    rotary_dim = 2 * sin.shape[-1]
    turned, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    sin, cos = sin[:, :, None], cos[:, :, None]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pairs, axis=-1) if interleaved else jnp.concatenate(pairs, axis=-1)
    turned = turned.reshape(*x.shape[:-1], rotary_dim).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)


def check_rotary_dim(rotary_dim: int, head_size: int) -> None:
    """Raises ValueError where heads of ``head_size`` have no ``rotary_dim`` features to turn in pairs."""
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_size:
        raise ValueError(f"language model: rotary_dim {rotary_dim} must be even and fit in one head")
