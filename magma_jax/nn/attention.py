"""Scaled dot-product attention and its masks.

A mask is a boolean array that broadcasts to (B, S, T), true where a query may look. For a prompt of two picture
positions p and two words w, and with "prefix" giving the picture full sight of itself:

    causal     prefix     full
    p p w w    p p w w    p p w w
    1 0 0 0    1 1 0 0    1 1 1 1
    1 1 0 0    1 1 0 0    1 1 1 1
    1 1 1 0    1 1 1 0    1 1 1 1
    1 1 1 1    1 1 1 1    1 1 1 1
"""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp

from magma_jax.typing import Array, Bool, Float, Int

_log = logging.getLogger(__name__)

# Finite, so that a row without any visible key gives finite (unused) numbers instead of NaN.
MASKED_SCORE = -1e30


def causal_mask(queries: Int[Array, "B S"], keys: Int[Array, "... T"]) -> Bool[Array, "B S T"]:
    """True where the position of the key is not after the position of the query."""
    return keys[..., None, :] <= queries[..., :, None]


def prefix_mask(
    queries: Int[Array, "B S"], keys: Int[Array, "... T"], prefix_length: Int[Array, " B"]
) -> Bool[Array, "B S T"]:
    """Causal, and every position sees the whole prefix of its row."""
    in_prefix = keys[..., None, :] < prefix_length[:, None, None]
    return causal_mask(queries, keys) | in_prefix


def same_segment(segments: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """True where query and key belong to the same sample of a row that holds several."""
    return segments[:, :, None] == segments[:, None, :]


def dot_product_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T K"],
    mask: Bool[Array, "#B #S T"] | None,
    *,
    scaled: bool = True,
    fused: bool = False,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B H S T"]]:
    """Returns the weighted values and the attention weights; scores and softmax are fp32.

    Keys and values have their heads first, as a cache holds them: what a head reads lies together.
    ``mask=None`` lets every query see every key; ``scaled`` divides the scores by sqrt(K). Weights that nobody uses are
    removed by the compiler. With ``fused`` the values come from cuDNN where ``cudnn_serves``, and weights that
    somebody uses are computed beside them.
    """
    scores = jnp.einsum("bshk,bhtk->bhst", q, k, preferred_element_type=jnp.float32)
    if scaled:
        scores = scores / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1)
    batch, length, _, size = q.shape
    if fused and length > 1 and _cudnn_serves(q, k):
        seen = None if mask is None else jnp.broadcast_to(mask, (batch, length, k.shape[2]))[:, None]
        by_position = (q, k.swapaxes(1, 2), v.swapaxes(1, 2))
        scale = 1 / math.sqrt(size) if scaled else 1.0
        out = jax.nn.dot_product_attention(*by_position, mask=seen, scale=scale, implementation="cudnn")
        return out, weights
    return jnp.einsum("bhst,bhtk->bshk", weights.astype(v.dtype), v), weights


def _cudnn_serves(q: Array, k: Array) -> bool:
    device, dtype = jax.devices()[0], jnp.promote_types(q.dtype, k.dtype)
    return cudnn_serves(device.platform, str(getattr(device, "compute_capability", "")), str(dtype), q.shape[-1])


@functools.cache
def cudnn_serves(platform: str, capability: str, dtype: str, head_size: int) -> bool:
    """Whether cuDNN's fused attention serves; the reason is logged, once for each combination.

    It never stores the scores, which for long prompts are most of what attention moves. The conditions are those that
    JAX checks before it calls cuDNN; that it would raise in place of falling back is why they stand here.

    Args:
        platform: of the device, such as ``gpu``.
        capability: of an NVIDIA device, such as ``9.0``; empty elsewhere.
        dtype: of queries, keys and values.
        head_size: K.
    """
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    generation = tuple(map(int, version.groups())) if version else (0, 0)
    largest = 256 if generation >= (9, 0) else 128
    if platform != "gpu" or not version:
        reason = "not an NVIDIA device"
    elif generation < (8, 0) or generation == (10, 3):
        reason = f"compute capability {capability} is not supported by every cuDNN that JAX takes"
    elif dtype not in ("bfloat16", "float16"):
        reason = f"it takes bfloat16 or float16, not {dtype}"
    elif head_size > largest or head_size % 8:
        reason = f"heads of {head_size} where compute capability {capability} takes multiples of 8 up to {largest}"
    else:
        _log.info("attention by cuDNN: heads of %d in %s, compute capability %s", head_size, dtype, capability)
        return True
    _log.info("attention by XLA: %s", reason)
    return False
