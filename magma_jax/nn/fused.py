"""Attention that stores no scores, by the fastest kernel that the device and the mask allow.

TPUs use Pallas' splash attention, NVIDIA GPUs cuDNN's; other devices, and masks that these do not support, use
``nn.blockwise``. The choice and its reason are logged once per kind of call.
"""

import functools
import logging
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from magma_jax.nn.blockwise import BLOCK, blockwise_attention
from magma_jax.nn.masks import Mask
from magma_jax.runtime.sharding import BATCH_AXES, target_platform
from magma_jax.typing import Array, Float

_log = logging.getLogger(__name__)

Kernel = Literal["splash", "cudnn", "blockwise"]

# Lanes of a TPU vector register: sequences and blocks of splash attention are multiples of it.
LANES = 128
# Block sizes of splash attention; the largest that divides the sequence is used, since larger blocks reuse more data.
SPLASH_BLOCKS = (1024, 512, 256, 128)


def fused_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B G T K"],
    mask: Mask,
    *,
    scale: float,
    kernel: Kernel | None = None,
) -> Float[Array, "B S H K"]:
    """Weighted values; H query heads share G key/value heads.

    Args:
        q: queries.
        k: keys, head-first as in the cache.
        v: values, likewise.
        mask: which keys each query sees.
        scale: factor of the scores.
        kernel: kernel to use; default: the choice of ``choose_kernel``.
    """
    kernel = kernel or choose_kernel(q, k, mask)
    if kernel == "splash":
        return splash_attention(q, k, v, mask, scale)
    if kernel == "cudnn":
        return _cudnn(q, k, v, mask, scale)
    return blockwise_attention(q, k, v, mask, scale=scale, block=BLOCK)


def choose_kernel(q: Array, k: Array, mask: Mask) -> Kernel:
    """The kernel for arrays of these shapes on the devices that the program is traced for."""
    window = "static" if isinstance(mask.window, int) and mask.positions is None else "traced"
    window = "" if mask.window is None else window
    rules = (mask.kind, window, mask.extra is not None, mask.queries is not None, mask.segments is not None)
    platform = target_platform()
    capability = ""
    if platform in ("gpu", "cuda"):
        capability = str(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", ""))
    dtype = str(jnp.promote_types(q.dtype, k.dtype))
    return kernel_for(platform, capability, dtype, q.shape[1], k.shape[2], q.shape[3], rules)


@functools.cache
def kernel_for(
    platform: str, capability: str, dtype: str, queries: int, keys: int, size: int, rules: tuple[object, ...]
) -> Kernel:
    """The kernel for one kind of call.

    Args:
        platform: platform of the device, such as ``gpu``.
        capability: see ``cudnn_refusal``.
        dtype: dtype of queries and keys.
        queries: number of queries, S.
        keys: number of keys, T.
        size: features per head, K.
        rules: the mask's kind; ``static``, ``traced`` or no window; whether it has ``extra``, ``queries`` and
            ``segments``.
    """
    kind, window, extra, placed, _ = rules
    kernel: Kernel = "blockwise"
    if platform == "tpu":
        if placed or extra or kind == "prefix" or window == "traced":
            reason = "splash attention supports only causal, full, windowed, segmented and padded rows"
        else:
            kernel, reason = "splash", f"{queries} x {keys} positions, heads of {size} in {dtype}"
    elif platform in ("gpu", "cuda"):
        reason = cudnn_refusal(platform, capability, dtype, size)
        if reason is None:
            kernel, reason = "cudnn", f"heads of {size} in {dtype}, compute capability {capability}"
    else:
        reason = f"no kernel for {platform}"
    _log.info("attention by %s: %s", kernel, reason)
    return kernel


def cudnn_refusal(platform: str, capability: str, dtype: str, head_size: int) -> str | None:
    """The reason why cuDNN's fused attention cannot be used; None if it can.

    The conditions repeat JAX's own checks, because JAX raises instead of falling back.

    Args:
        platform: platform of the device, such as ``gpu``.
        capability: compute capability of an NVIDIA device, such as ``9.0``; empty elsewhere.
        dtype: dtype of queries, keys and values.
        head_size: features per head, K.
    """
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    generation = tuple(map(int, version.groups())) if version else (0, 0)
    largest = 256 if generation >= (9, 0) else 128
    if platform not in ("gpu", "cuda") or not version:
        return "not an NVIDIA device"
    if generation < (8, 0) or generation == (10, 3):
        return f"compute capability {capability} is not supported by every cuDNN that JAX takes"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, not {dtype}"
    if head_size > largest or head_size % 8:
        return f"heads of {head_size} where compute capability {capability} takes multiples of 8 up to {largest}"
    return None


def _cudnn(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    batch, length = q.shape[:2]
    options: dict[str, Any] = {"scale": scale, "implementation": "cudnn"}
    plain = mask.queries is None and mask.extra is None and mask.segments is None and mask.kind != "prefix"
    window = mask.window if mask.kind == "causal" and isinstance(mask.window, int) and mask.positions is None else None
    if plain and (mask.window is None or window is not None):
        options["is_causal"] = mask.kind == "causal"
        if window is not None:
            options["local_window_size"] = (window - 1, 0)
        if mask.lengths is not None:
            options["key_value_seq_lengths"] = mask.lengths.astype(jnp.int32)
            options["query_seq_lengths"] = jnp.full(batch, length, jnp.int32)
    else:
        options["mask"] = jnp.broadcast_to(mask.dense(length, k.shape[2]), (batch, length, k.shape[2]))[:, None]
    return jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), **options)


def splash_attention(q: Array, k: Array, v: Array, mask: Mask, scale: float, *, interpret: bool = False) -> Array:
    """``fused_attention`` by Pallas' kernel; ``interpret`` runs it without a TPU.

    It runs per device on local rows and heads, because the compiler cannot partition a Pallas kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    segments = _segments(mask, q.shape[0], q.shape[1], k.shape[2])
    run = functools.partial(_splash_local, mask=mask, scale=scale, interpret=interpret)
    if mesh.empty:
        return run(q, k, v, segments)
    heads = "model" if not (q.shape[2] % mesh.shape["model"] or k.shape[1] % mesh.shape["model"]) else None
    rows = PartitionSpec(BATCH_AXES)
    specs = (PartitionSpec(BATCH_AXES, None, heads), *[PartitionSpec(BATCH_AXES, heads)] * 2)
    specs += (None if segments is None else (rows, rows),)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(q, k, v, segments)


def _segments(mask: Mask, batch: int, queries: int, keys: int) -> tuple[Array, Array] | None:
    """Segment ids of queries (B, S) and keys (B, T); equal ids see each other. None if the mask needs none."""
    if mask.segments is None and mask.lengths is None:
        return None
    q = jnp.ones((batch, queries), jnp.int32) if mask.segments is None else mask.segments
    k = jnp.ones((batch, keys), jnp.int32) if mask.segments is None else mask.segments
    if mask.lengths is not None:
        k = jnp.where(jnp.arange(keys) < mask.lengths[:, None], k, -1)
    return q, k


def _splash_local(
    q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None, *, mask: Mask, scale: float, interpret: bool
) -> Array:
    # Imported here: Pallas takes half a second to import and is needed on TPUs only.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    queries, keys = (-(-size // LANES) * LANES for size in (length, k.shape[2]))
    if keys > k.shape[2] and mask.kind == "full" and segments is None:
        # Padding must not be seen; a causal mask hides it anyway.
        segments = _segments(Mask("full", lengths=jnp.full(q.shape[0], k.shape[2])), q.shape[0], length, k.shape[2])
    q = jnp.pad(q * scale, ((0, 0), (0, queries - length), (0, 0), (0, 0))).swapaxes(1, 2)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, keys - x.shape[2]), (0, 0))) for x in (k, v))
    if segments is not None:
        padded = zip(segments, (queries, keys), (-2, -1), strict=True)
        segments = splash.SegmentIds(
            *(jnp.pad(ids, ((0, 0), (0, size - ids.shape[1])), constant_values=out) for ids, size, out in padded)
        )
    shape = (queries, keys)
    if mask.window is not None:
        rule = masks.LocalMask(shape, (mask.window - 1, 0 if mask.kind == "causal" else None), offset=0)
    else:
        rule = masks.CausalMask(shape) if mask.kind == "causal" else masks.FullMask(shape)
    block_q, block_kv = (next(block for block in SPLASH_BLOCKS if size % block == 0) for size in shape)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([rule] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out: Any = jax.vmap(kernel)(q, k, v) if segments is None else jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :length]
