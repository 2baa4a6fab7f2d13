"""Random masks of training: how many tokens of each row are masked, and which.

They follow from the row's seed alone, so that a batch in parts, or on other devices, is masked alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.schedules import highest, mask_ratio, masked_count
from magma_jax.typing import Array, Bool, Float, Int, Key

# Stream of a row's key that says whether its image is masked as a whole; those of ``split`` are below.
BLANK = 4


class Masks(NamedTuple):
    """Masked places of images (B, I) and texts (B, T), and those of images that the loss is of."""

    image: Array
    text: Array
    targets: Array  # (B, I)


def row_keys(seeds: Int[Array, " B"], stream: int) -> Key[Array, " B"]:
    """A key for each row's seed; streams are independent."""
    key = jax.random.key(stream)
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)


def image_count(r: Float[Array, " B"], places: Int[Array, " B"]) -> Int[Array, " B"]:
    """Codes to mask for a draw r from [0, 1): a share of cos(pi r / 2) of the places, at least one."""
    return jnp.clip(masked_count(mask_ratio("cosine", r), places), 1, places)


def text_count(r: Float[Array, " B"], places: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens to mask for a draw r from [0, 1): a share of r of the places, at least one.

    Few for an r that masks many codes, as in the original.
    """
    return jnp.clip(masked_count(r, places), 1, places)


def nested_count(ratio: Float[Array, " B"], places: Int[Array, " B"]) -> Int[Array, " B"]:
    """Places of a mask within a first one: a share of its places, rounded down, at least one, as in the original."""
    return jnp.clip(jnp.floor(ratio * places + 1e-4).astype(jnp.int32), 1, places)


def draw_masks(
    keys: Key[Array, " B"],
    image: Bool[Array, "B I"],
    text: Bool[Array, "B T"],
    *,
    independent: bool,
    nested: bool = False,
    limit: int = 0,
    blank: float = 0.0,
) -> Masks:
    """Masks of images and texts, all maskable places equally likely.

    Args:
        keys: random key of each row.
        image: maskable places of images.
        text: maskable places of texts.
        independent: whether the two shares are drawn apart instead of from one r.
        nested: whether the places are those of a first mask, see ``nested_count``.
        limit: masked places of an image that are targets, at most; 0 for all.
        blank: share of rows whose image is masked as a whole.
    """

    def draw(key, image, text):
        image_r, text_r, image_key, text_key = jax.random.split(key, 4)
        r = jax.random.uniform(image_r)
        other = jax.random.uniform(text_r) if independent else r
        if blank:
            r = jnp.where(jax.random.uniform(jax.random.fold_in(key, BLANK)) < blank, 0.0, r)
        return r, other, jax.random.uniform(image_key, image.shape), jax.random.uniform(text_key, text.shape)

    r, text_r, image_scores, text_scores = jax.vmap(draw)(keys, image, text)
    codes, words = (places.sum(-1, dtype=jnp.int32) for places in (image, text))
    if nested:
        counts = nested_count(mask_ratio("cosine", r), codes), nested_count(text_r, words)
    else:
        counts = image_count(r, codes), text_count(text_r, words)
    masked = highest(image_scores, image, counts[0])
    # The highest among the highest, so they are as random as these.
    targets = highest(image_scores, masked, jnp.minimum(counts[0], limit)) if limit else masked
    return Masks(image=masked, text=highest(text_scores, text, counts[1]), targets=targets)
