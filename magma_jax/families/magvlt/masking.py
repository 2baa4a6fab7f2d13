"""Random masks of training: how many tokens of each row are masked, and which."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.schedules import highest, mask_ratio, masked_count
from magma_jax.typing import Array, Bool, Float, Int, PRNGKey


class Masks(NamedTuple):
    """Masked places of images (B, I) and texts (B, T)."""

    image: Array
    text: Array


def image_count(r: Float[Array, " B"], positions: int) -> Int[Array, " B"]:
    """Codes to mask for a draw r from [0, 1): a share of cos(pi r / 2), at least one."""
    return jnp.clip(masked_count(mask_ratio("cosine", r), jnp.full(r.shape, positions)), 1, positions)


def text_count(r: Float[Array, " B"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens to mask for a draw r from [0, 1): a share of r, at least one.

    Few for an r that masks many codes, as in the original.
    """
    return jnp.clip(masked_count(r, lengths), 1, lengths)


def draw_places(key: PRNGKey, maskable: Bool[Array, "B S"], count: Int[Array, " B"]) -> Bool[Array, "B S"]:
    """That many of the maskable places of each row, all equally likely."""
    return highest(jax.random.uniform(key, maskable.shape), maskable, count)


def draw_masks(
    key: PRNGKey, lengths: Int[Array, " B"], image_positions: int, text_positions: int, *, independent: bool
) -> Masks:
    """Masks of images and texts; padding is never masked.

    Args:
        key: random key.
        lengths: text lengths, end token included.
        image_positions: codes of an image.
        text_positions: text tokens, padding included.
        independent: whether the two shares are drawn apart instead of from one r.
    """
    keys = jax.random.split(key, 4)
    r = jax.random.uniform(keys[0], lengths.shape)
    text_r = jax.random.uniform(keys[1], lengths.shape) if independent else r
    codes = jnp.ones((len(lengths), image_positions), bool)
    words = jnp.arange(text_positions) < lengths[:, None]
    return Masks(
        image=draw_places(keys[2], codes, image_count(r, image_positions)),
        text=draw_places(keys[3], words, text_count(text_r, lengths)),
    )
