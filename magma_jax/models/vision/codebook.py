"""Codebooks that do not collapse: a start by k-means, restarts of unused codes, and how many are used."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from magma_jax.models.vision.quantizer import nearest_codes
from magma_jax.typing import Array, Float, Int, PRNGKey


class Restarted(NamedTuple):
    """Result of ``restart_unused``.

    Attributes:
        codebook: codes, unused ones replaced.
        usage: usage, that of replaced codes set to the mean.
        replaced: number of replaced codes.
    """

    codebook: Float[Array, "N D"]
    usage: Float[Array, " N"]
    replaced: Int[Array, ""]


def kmeans(
    key: PRNGKey, vectors: Float[Array, "M D"], codes: int, *, iterations: int = 10
) -> Float[Array, "{codes} D"]:
    """Codebook of ``codes`` means of ``vectors`` (Lloyd's algorithm), fp32.

    It starts from distinct vectors; in every iteration a code without vectors moves to a random one.

    Raises:
        ValueError: fewer vectors than codes.
    """
    if len(vectors) < codes:
        raise ValueError(f"a codebook of {codes} codes needs at least as many vectors, got {len(vectors)}")
    vectors = vectors.astype(jnp.float32)
    start_key, move_key = jax.random.split(key)

    def iteration(codebook: Array, key: Array) -> tuple[Array, None]:
        nearest = nearest_codes(vectors, codebook)
        sums = jax.ops.segment_sum(vectors, nearest, codes)
        counts = code_counts(nearest, codes)[:, None]
        moved = vectors[jax.random.choice(key, len(vectors), (codes,), replace=False)]
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), moved), None

    start = vectors[jax.random.choice(start_key, len(vectors), (codes,), replace=False)]
    return jax.lax.scan(iteration, start, jax.random.split(move_key, iterations))[0]


def update_usage(usage: Float[Array, " N"], codes: Int[Array, "*batch"], decay: float = 0.99) -> Float[Array, " N"]:
    """Moving average of how often a batch uses each code."""
    return decay * usage + (1 - decay) * code_counts(codes, len(usage))


def restart_unused(
    key: PRNGKey,
    codebook: Float[Array, "N D"],
    usage: Float[Array, " N"],
    latents: Float[Array, "*batch D"],
    errors: Float[Array, "*batch"],
    *,
    threshold: float = 0.03,
) -> Restarted:
    """Replaces codes whose usage is below ``threshold`` times the mean by random ``latents`` of the batch.

    They are drawn with probabilities in proportion to ``errors``, their squared distances to their codes, as in
    k-means++ (Arthur and Vassilvitskii, 2007): those of frequent codes would soon be unused again. They are distinct as
    long as there are enough of them. With ``threshold=0`` nothing is replaced.
    """
    candidates = latents.reshape(-1, latents.shape[-1])
    unused = usage < threshold * usage.mean()
    chances = jnp.log(errors.reshape(-1).astype(jnp.float32)) + jax.random.gumbel(key, (len(candidates),))
    order = jnp.argsort(-chances)
    chosen = candidates[order[(jnp.cumsum(unused) - 1) % len(candidates)]].astype(codebook.dtype)
    return Restarted(
        codebook=jnp.where(unused[:, None], chosen, codebook),
        usage=jnp.where(unused, usage.mean(), usage),
        replaced=unused.sum(),
    )


def code_counts(codes: Int[Array, "*batch"], size: int) -> Float[Array, " {size}"]:
    """How often each of ``size`` codes occurs."""
    return jnp.zeros(size).at[codes.reshape(-1)].add(1)


def share_used(counts: Float[Array, " N"]) -> Float[Array, ""]:
    """Share of the codes that occur."""
    return (counts > 0).mean()


def perplexity(counts: Float[Array, " N"]) -> Float[Array, ""]:
    """Exponential of the entropy of the codes: N if all are equally frequent, 1 if only one occurs."""
    shares = counts / counts.sum()
    return jnp.exp(-jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-38)), 0).sum())
