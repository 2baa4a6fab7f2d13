"""Linear, embedding, norms and dropout.

Weights are stored output-major, ``(out, in)``, as PyTorch stores them: conversion is then a copy without a
transpose, and the matrix-vector products of decoding read memory in order (on a CPU three times as fast as the
``(in, out)`` layout). Trained weights are fp32, frozen ones have the config's dtype; each is cast to the dtype of the
activations where it is used.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from magma_jax.nn import cpu
from magma_jax.nn.quantized import QUANTIZED, dequantize, float_dtype, quantize
from magma_jax.typing import Array, Float, Int, PRNGKey

Initializer = Callable[[PRNGKey, tuple[int, ...], DTypeLike], Array]


def normal(std: float) -> Initializer:
    """Normal distribution of standard deviation ``std``."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape)).astype(dtype)


def truncated_normal(std: float, limit: float) -> Initializer:
    """Normal distribution of standard deviation ``std``; values beyond ``limit`` standard deviations are redrawn."""
    return lambda key, shape, dtype: (std * jax.random.truncated_normal(key, -limit, limit, shape)).astype(dtype)


def clipped_normal(std: float) -> Initializer:
    """Normal distribution clipped (not redrawn) at two standard deviations, as the original fills its adapters."""

    def init(key, shape, dtype):
        return jnp.clip(std * jax.random.normal(key, shape), -2 * std, 2 * std).astype(dtype)

    return init


def fan_in_uniform(key: PRNGKey, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Uniform in ±1/sqrt(fan in) for weights ``(out, in, ...)``: PyTorch's default, which the original keeps."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)


def zeros(key: PRNGKey, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """All zeros."""
    return jnp.zeros(shape, dtype)


@cpu.few_rows
def product(x: Float[Array, "... in"], weight: Float[Array, "out in"], **options: Any) -> Float[Array, "... out"]:
    """``x W^T``; ``options`` are those of ``jnp.einsum``."""
    return jnp.einsum("...i,oi->...o", x, weight, **options)


class Linear(nnx.Module):
    """``y = x W^T + b`` with ``W`` of shape (out, in); with ``dtype`` int8 or int4 the matrix is quantized."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        param: type[nnx.Param],
        rngs: nnx.Rngs,
        use_bias: bool = True,
        weight_init: Initializer = fan_in_uniform,
        bias_init: Initializer = zeros,
        dtype: str = "float32",
    ):
        weight, scale = weight_init(rngs.params(), (out_features, in_features), float_dtype(dtype)), None
        if dtype in QUANTIZED:
            weight, scale = quantize(weight, dtype)
        self.weight = param(weight)
        self.weight_scale = None if scale is None else param(scale)
        bias = bias_init(rngs.params(), (out_features,), float_dtype(dtype)) if use_bias else None
        self.bias = None if bias is None else param(bias, decay=False)

    def __call__(
        self, x: Float[Array, "... in"], preferred_element_type: DTypeLike | None = None
    ) -> Float[Array, "... out"]:
        weight, options = self.weight[...], {"preferred_element_type": preferred_element_type}
        if self.weight_scale is None:
            y = product(x, weight.astype(x.dtype), **options)
        elif weight.dtype == jnp.int8:
            # There is one scale per output, so it can be applied after the product.
            y = product(x, weight.astype(x.dtype), **options) * self.weight_scale[...][:, 0]
            y = y.astype(preferred_element_type or x.dtype)
        else:
            y = product(x, dequantize(weight, self.weight_scale[...], x.dtype), **options)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Embedding(nnx.Module):
    """Table of shape (rows, width)."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        param: type[nnx.Param],
        rngs: nnx.Rngs,
        weight_init: Initializer,
        dtype: DTypeLike = jnp.float32,
    ):
        self.weight = param(weight_init(rngs.params(), (rows, width), dtype))

    def __call__(self, ids: Int[Array, "..."], dtype: DTypeLike) -> Float[Array, "... D"]:
        return self.weight[...][ids].astype(dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in fp32, returned in the dtype of its input.

    Without ``affine`` it has no parameters; ``scale`` is what its weights start at.
    """

    def __init__(
        self,
        width: int,
        *,
        param: type[nnx.Param],
        eps: float = 1e-5,
        affine: bool = True,
        scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.weight = param(jnp.full((width,), scale, dtype), decay=False) if affine else None
        self.bias = param(jnp.zeros((width,), dtype), decay=False) if affine else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * (weight + offset)`` over the last axis (Zhang and Sennrich, 2019), computed in fp32."""

    def __init__(
        self,
        width: int,
        *,
        param: type[nnx.Param],
        eps: float = 1e-6,
        offset: float = 0.0,
        dtype: DTypeLike = jnp.float32,
    ):
        self.eps, self.offset = eps, offset
        self.weight = param(jnp.full((width,), 1 - offset, dtype), decay=False)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (y * (self.weight[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


def dropout(x: Float[Array, "*shape"], rate: float, key: PRNGKey | None) -> Float[Array, "*shape"]:
    """Inverted dropout; with ``key=None`` the input is returned unchanged."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
