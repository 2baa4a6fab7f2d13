"""Weights of a frozen language model in 8 or 4 bits, quantized by qwix: symmetric, rounded to nearest.

``int8``: one scale per output of a matrix. ``int4``: one scale per ``GROUP`` inputs of an output, two numbers per byte.
Only weights are quantized, not activations. Scales are fp32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.config import QUANTIZED
from magma_jax.typing import Array, Float

# Inputs that share a scale in 4 bits. If it does not divide a matrix's number of inputs, all of them share one scale.
GROUP = 128


def float_dtype(dtype: str) -> str:
    """Dtype in which unquantized weights are created; loading casts them to the dtype of the activations."""
    return "bfloat16" if dtype in QUANTIZED else dtype


def quantize(weight: Float[Array, "... out in"], dtype: str) -> tuple[Array, Array]:
    """Quantized values, int8 (..., out, in) or uint8 (..., out, in / 2), and scales (..., out, groups)."""
    import qwix  # here: it takes a second, and few models need it

    weight = weight.astype(jnp.float32)
    *leading, out, inputs = weight.shape
    channels = tuple(range(weight.ndim - 1))
    if dtype == "int8":
        quantized = qwix.quantize(weight, jnp.int8, channelwise_axes=channels)
        return quantized.qvalue, quantized.scale
    if inputs % 2:
        raise ValueError(f"a matrix of {inputs} inputs cannot be stored in 4 bits: two share a byte")
    group = GROUP if inputs % GROUP == 0 else inputs
    quantized = qwix.quantize(weight, jnp.int4, channelwise_axes=channels, tiled_axes={weight.ndim - 1: group})
    pairs = quantized.qvalue.reshape(*leading, out, inputs // 2, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint8), quantized.scale


def dequantize(stored: Array, scale: Float[Array, "... out groups"], dtype: Any) -> Float[Array, "... out in"]:
    """The dequantized weights."""
    import qwix

    if stored.dtype == jnp.uint8:
        pairs = jax.lax.bitcast_convert_type(stored, jnp.int4)
        stored = pairs.reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    return qwix.dequantize(qwix.QArray(stored, scale)).astype(dtype)
