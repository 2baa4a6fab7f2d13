"""Rotary position embedding over interleaved pairs, as GPT-J applies it.

The first ``rotary_dim`` features of each head are pairs (0,1), (2,3), ...; pair i is turned by the angle
``position / base**(2i / rotary_dim)``. Angles, sines and cosines are fp32: bf16 cannot represent position 257.
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
    x: Float[Array, "B S H K"], sin: Float[Array, "B S R"], cos: Float[Array, "B S R"]
) -> Float[Array, "B S H K"]:
    """Turns the first 2R features of each head; the rest pass unchanged."""
    rotary_dim = 2 * sin.shape[-1]
    turned, rest = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    sin, cos = sin[:, :, None], cos[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], rotary_dim).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)
