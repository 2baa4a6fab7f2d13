"""Convolution, pooling and BatchNorm on images of shape (B, height, width, channels)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn.layers import fan_in_uniform
from magma_jax.nn.modules import EncoderParam, Statistic
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
        stride: int = 1,
        padding: int = 0,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = EncoderParam(fan_in_uniform(rngs.params(), shape, jnp.float32))
        self.bias = EncoderParam(jnp.zeros((out_channels,)), decay=False) if use_bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        y = conv2d(x, self.weight[...].astype(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def conv2d(
    x: Float[Array, "B h w i"], weight: Float[Array, "o i k k"], stride: int, padding: int
) -> Float[Array, "B h2 w2 o"]:
    """Convolution with symmetric zero padding.

    On a CPU it is a matmul with the pixels under the kernel side by side: XLA:CPU runs convolutions inside of loops,
    and many gradients of convolutions, 10 to 100 times slower than that.
    """
    x = split_rows(x)
    if weight.shape[2] == 1 and stride == 1 and padding == 0:
        y = jnp.einsum("bhwi,oi->bhwo", x, weight[:, :, 0, 0])
    elif weight.shape[2] == stride and padding == 0:
        y = _patches_matmul(x, weight)
    else:
        y = _conv2d(stride, padding, x, weight)
    return split_rows(y)


def _patches_matmul(x: Array, weight: Array) -> Array:
    """Windows that do not overlap are a reshape: one matmul everywhere, where 32 x 32 slices take long to compile."""
    size = weight.shape[2]
    batch, (rows, columns), channels = x.shape[0], (side // size for side in x.shape[1:3]), x.shape[3]
    x = x[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return jnp.einsum("brkcli,oikl->brco", x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv2d(stride: int, padding: int, x: Array, weight: Array) -> Array:
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_windows_matmul, stride, padding),
        default=functools.partial(_convolve, stride, padding),
    )


def _forward(stride, padding, x, weight):
    # Kept for the gradient is x, not the copies of its pixels, of which there are kernel x kernel.
    return _conv2d(stride, padding, x, weight), (x, weight)


def _backward(stride, padding, kept, gradient):
    def transposed(function):
        function = functools.partial(function, stride, padding)

        # A convolution is linear in each of its arguments, so its gradients are transposes and need no forward pass.
        def gradients(x, weight, gradient):
            (dx,) = jax.linear_transpose(lambda x: function(x, weight), x)(gradient)
            (dweight,) = jax.linear_transpose(lambda weight: function(x, weight), weight)(gradient)
            return dx, dweight

        return gradients

    return jax.lax.platform_dependent(*kept, gradient, cpu=transposed(_windows_matmul), default=transposed(_convolve))


_conv2d.defvjp(_forward, _backward)


def _convolve(stride: int, padding: int, x: Array, weight: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def _windows_matmul(stride: int, padding: int, x: Array, weight: Array) -> Array:
    kernel = weight.shape[2]
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
    matrix = weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return jnp.einsum("bhwi,oi->bhwo", jnp.concatenate(windows, -1), matrix)


def average_pool(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B h2 w2 C"]:
    """Mean over windows of ``size`` x ``size``; rows and columns that fill no window are dropped."""
    if size == 1:
        return x
    h, w = (side // size * size for side in x.shape[1:3])
    # A sum of slices: XLA:CPU of jax 0.12 gives NaN for bf16 when it fuses convolution, ReLU and a windowed mean.
    parts = [x[:, i:h:size, j:w:size].astype(jnp.float32) for i in range(size) for j in range(size)]
    return (sum(parts) / size**2).astype(x.dtype)


class BatchNorm(nnx.Module):
    """BatchNorm with an explicit mode.

    ``frozen`` normalises with the running statistics. ``batch`` normalises with the statistics of the batch and
    updates the running ones as PyTorch does (momentum 0.1, unbiased variance). Under ``jit`` over a mesh the batch is
    the global one, so the statistics are synchronised over devices.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        # The original's weight decay spares the weights of LayerNorms, but not these.
        self.weight = EncoderParam(jnp.ones((channels,)))
        self.bias = EncoderParam(jnp.zeros((channels,)), decay=False)
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
