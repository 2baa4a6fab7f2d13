"""Combination of the logits of several streams, which hold the same generated tokens after different prompts.

Pure, jittable functions on fp32 logits. They come before everything in ``sampling``: restriction of the vocabulary,
temperature and top-p see their result.
"""

import jax
import jax.numpy as jnp

from magma_jax.inference.decoding.sampling import MASKED
from magma_jax.typing import Array, Float, Int

Weight = float | int | Float[Array, " B"]

# Largest k of ``contrast``: the k-th likeliest token is one of so many, since k may be traced.
MAX_K = 64


def guide(conditional: Float[Array, "B V"], unconditional: Float[Array, "B V"], weight: Weight) -> Float[Array, "B V"]:
    """Classifier-free guidance, ``u + weight * (c - u)`` (Yu et al. 2023, equations 1 and 2).

    A weight of 1 returns ``conditional`` bit for bit, of 0 nearly ``unconditional``; weights of rows may differ.
    """
    return conditional + _excess(weight) * (conditional - unconditional)


def guide_edit(
    nothing: Float[Array, "B V"],
    image: Float[Array, "B V"],
    both: Float[Array, "B V"],
    *,
    image_weight: Weight,
    text_weight: Weight,
) -> Float[Array, "B V"]:
    """Guidance by an image and an instruction, ``n + a_I (i - n) + a_T (b - i)`` (section 4.1; 1.5 and 7.5 there).

    Weights of 1 return ``both`` bit for bit.

    Args:
        nothing: logits of the stream without image and instruction.
        image: of the stream with the image alone.
        both: of the stream with image and instruction.
        image_weight: a_I.
        text_weight: a_T.
    """
    return both + _excess(image_weight) * (image - nothing) + _excess(text_weight) * (both - image)


def contrast(
    expert: Float[Array, "B V"], amateur: Float[Array, "B V"], *, k: int | Int[Array, " B"], alpha: Weight
) -> Float[Array, "B V"]:
    """Scores of contrastive decoding, CD-K: ``log p_expert - log p_amateur`` of the plausible tokens (equation 3).

    Plausible is what the expert finds at least ``alpha`` times as likely as its ``k``-th likeliest token; others are
    ``MASKED``. k = 1 is ordinary contrastive decoding (Li et al. 2022). The scores are logits to sample from.

    Args:
        expert: logits of the stream with the condition.
        amateur: of the stream without it; its temperature is applied before (0.5 in the authors' script).
        k: 1 to ``MAX_K`` and to V; others are taken for the nearest of these.
        alpha: above 0, at most 1.
    """
    expert, amateur = jax.nn.log_softmax(expert), jax.nn.log_softmax(amateur)
    likeliest = jax.lax.top_k(expert, min(MAX_K, expert.shape[-1]))[0]
    place = jnp.broadcast_to(jnp.clip(jnp.asarray(k) - 1, 0, likeliest.shape[-1] - 1), expert.shape[:1])
    least = jnp.take_along_axis(likeliest, place[:, None], axis=-1)
    least += jnp.log(jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), expert.shape[:1]))[:, None]
    return jnp.where(expert >= least, expert - amateur, MASKED)


def _excess(weight: Weight) -> Float[Array, "..."]:
    """``weight - 1`` as a column."""
    return (jnp.asarray(weight, jnp.float32) - 1)[..., None]
