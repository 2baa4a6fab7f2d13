"""Vector quantisation (van den Oord et al., 2017): nearest code, straight-through gradient, codebook losses."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from magma_jax.typing import Array, Float, Int

# Which of the two terms ``beta`` multiplies.
CodebookLoss: TypeAlias = Literal["taming", "vqvae"]


def nearest_codes(latents: Float[Array, "*batch D"], codebook: Float[Array, "N D"]) -> Int[Array, "*batch"]:
    """Row of ``codebook`` at the smallest L2 distance, the first of equal ones; distances are fp32."""
    rows = codebook.astype(jnp.float32)
    # |z|^2 is the same for every code. A bf16 product would choose other codes.
    dots = jnp.einsum("...d,nd->...n", latents.astype(jnp.float32), rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(rows).sum(-1) - 2 * dots, -1).astype(jnp.int32)


def straight_through(
    latents: Float[Array, "*batch D"], quantized: Float[Array, "*batch D"]
) -> Float[Array, "*batch D"]:
    """``quantized``, whose gradient goes to ``latents`` unchanged and not to the codebook."""
    return latents + jax.lax.stop_gradient(quantized - latents)


def codebook_loss(
    latents: Float[Array, "*batch D"], quantized: Float[Array, "*batch D"], kind: CodebookLoss, beta: float = 0.25
) -> Float[Array, ""]:
    """Commitment term (moves ``latents``) plus codebook term (moves the rows in ``quantized``), mean squares in fp32.

    Args:
        latents: encoder outputs.
        quantized: their codebook rows, not passed through ``straight_through``.
        kind: ``taming`` is commitment + beta * codebook, which taming-transformers' published weights were trained
            with (its "legacy" option); ``vqvae`` is codebook + beta * commitment, as in the paper.
        beta: weight of the smaller term.
    """
    latents, quantized = latents.astype(jnp.float32), quantized.astype(jnp.float32)
    commitment = jnp.square(jax.lax.stop_gradient(quantized) - latents).mean()
    codebook = jnp.square(quantized - jax.lax.stop_gradient(latents)).mean()
    if kind == "taming":
        return commitment + beta * codebook
    if kind == "vqvae":
        return codebook + beta * commitment
    raise ValueError(f"codebook loss must be 'taming' or 'vqvae', got {kind!r}")
