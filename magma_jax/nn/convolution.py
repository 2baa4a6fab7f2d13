"""Convolution, pooling, BatchNorm and GroupNorm on images of shape (B, height, width, channels)."""

from typing import Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn import cpu
from magma_jax.nn.layers import Initializer, fan_in_uniform
from magma_jax.nn.modules import Statistic
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float

BatchNormMode = Literal["frozen", "batch"]


class Conv2d(nnx.Module):
    """Square convolution; the weight has PyTorch's shape (out, in, kernel, kernel)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        param: type[nnx.Param],
        stride: int = 1,
        padding: int = 0,
        use_bias: bool = False,
        weight_init: Initializer = fan_in_uniform,
        rngs: nnx.Rngs,
    ):
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = param(weight_init(rngs.params(), shape, jnp.float32))
        self.bias = param(jnp.zeros((out_channels,)), decay=False) if use_bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        y = conv2d(x, self.weight[...].astype(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def conv2d(
    x: Float[Array, "B h w i"], weight: Float[Array, "o i k k"], stride: int, padding: int
) -> Float[Array, "B h2 w2 o"]:
    """Convolution with symmetric zero padding of ``padding`` pixels."""
    x = split_rows(x)
    if weight.shape[2] == 1 and stride == 1 and padding == 0:
        y = jnp.einsum("bhwi,oi->bhwo", x, weight[:, :, 0, 0])
    elif weight.shape[2] == stride and padding == 0:
        y = _patches_product(x, weight)
    else:
        y = _convolve(x, weight, stride, padding)
    return split_rows(y)


@cpu.pixels_side_by_side
def _convolve(x: Array, weight: Array, stride: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def _patches_product(x: Array, weight: Array) -> Array:
    """Convolution of non-overlapping windows as a reshape and one matmul; 32 x 32 slices would compile slowly."""
    size = weight.shape[2]
    batch, (rows, columns), channels = x.shape[0], (side // size for side in x.shape[1:3]), x.shape[3]
    x = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return jnp.einsum("brkcli,oikl->brco", x, weight)


def average_pool(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B h2 w2 C"]:
    """Mean over windows of ``size`` x ``size``; rows and columns that fill no window are dropped."""
    if size == 1:
        return x
    h, w = (side // size * size for side in x.shape[1:3])
    # A sum of slices: XLA:CPU of jax 0.12 gives NaN for bf16 when it fuses convolution, ReLU and a windowed mean.
    parts = [x[:, i:h:size, j:w:size].astype(jnp.float32) for i in range(size) for j in range(size)]
    return (cast(Array, sum(parts)) / size**2).astype(x.dtype)


class BatchNorm(nnx.Module):
    """BatchNorm with an explicit mode.

    ``frozen`` normalises with the running statistics. ``batch`` normalises with the statistics of the batch and
    updates the running ones as PyTorch does (momentum 0.1, unbiased variance). Under ``jit`` over a mesh the batch is
    the global one, so the statistics are synchronised over devices.
    """

    def __init__(self, channels: int, *, param: type[nnx.Param], eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        # The original exempts LayerNorm weights from weight decay, but not these.
        self.weight = param(jnp.ones((channels,)))
        self.bias = param(jnp.zeros((channels,)), decay=False)
        self.running_mean = Statistic(jnp.zeros((channels,)))
        self.running_var = Statistic(jnp.ones((channels,)))
        self.num_batches_tracked = Statistic(jnp.zeros((), jnp.int32))

    def __call__(self, x: Float[Array, "B h w C"], mode: BatchNormMode) -> Float[Array, "B h w C"]:
        if mode == "batch":
            x32 = x.astype(jnp.float32)
            mean = x32.mean((0, 1, 2))
            variance = jnp.square(x32 - mean).mean((0, 1, 2))
            count = x.size // x.shape[-1]
            unbiased = variance * (count / max(count - 1, 1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running[...] = jax.lax.stop_gradient((1 - self.momentum) * running[...] + self.momentum * new)
            self.num_batches_tracked[...] = self.num_batches_tracked[...] + 1
        elif mode == "frozen":
            mean = jax.lax.stop_gradient(self.running_mean[...])
            variance = jax.lax.stop_gradient(self.running_var[...])
        else:
            raise ValueError(f"BatchNorm mode must be 'frozen' or 'batch', not {mode!r}")
        scale = self.weight[...] * jax.lax.rsqrt(variance + self.eps)
        return x * scale.astype(x.dtype) + (self.bias[...] - mean * scale).astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm (Wu and He, 2018) over positions and the channels of a group, computed in fp32.

    Returned in the dtype of its input. ValueError if ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, *, param: type[nnx.Param], groups: int = 32, eps: float = 1e-6):
        if channels % groups:
            raise ValueError(f"GroupNorm of {groups} groups needs a multiple of {groups} channels, got {channels}")
        self.groups, self.eps = groups, eps
        self.weight = param(jnp.ones((channels,)), decay=False)
        self.bias = param(jnp.zeros((channels,)), decay=False)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.weight[...] + self.bias[...]).astype(x.dtype)
