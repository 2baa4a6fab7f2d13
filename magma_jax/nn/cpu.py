"""Matmul and convolution forms that are faster on CPUs, applied to the plain ones as decorators.

``TUNED`` is the only switch: False traces the plain forms for every device. Results are equal up to summation order.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from magma_jax.typing import Array

TUNED = True

# For this many rows a CPU is fastest with the weight on the left: it reads weights at 22 GB/s, against 11 GB/s with 8
# rows on the left. From 64 rows on the matmul is compute-bound.
FEW_ROWS = range(2, 33)


def few_rows(plain: Callable[..., Array]) -> Callable[..., Array]:
    """Decorates ``plain(x, weight, **options)``, which is ``x W^T`` with options of ``jnp.einsum``, for few rows."""

    @functools.wraps(plain)
    def product(x: Array, weight: Array, **options: Any) -> Array:
        rows = math.prod(x.shape[:-1])
        if not TUNED or rows not in FEW_ROWS:
            return plain(x, weight, **options)

        def weight_on_the_left(x: Array, weight: Array) -> Array:
            y = jnp.einsum("oi,ri->or", weight, x.reshape(rows, -1), **options)
            # Without the barrier XLA would fold the transpose into the matmul and undo the choice.
            return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)

        return jax.lax.platform_dependent(
            x, weight, cpu=weight_on_the_left, default=functools.partial(plain, **options)
        )

    return product


def pixels_side_by_side(plain: Callable[..., Array]) -> Callable[[Array, Array, int, int], Array]:
    """Decorates the convolution ``plain(x, weight, stride, padding)`` with an im2col matmul for CPUs.

    XLA:CPU runs convolutions inside loops, and many gradients of convolutions, 10 to 100 times slower than that.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def tuned(x: Array, weight: Array, stride: int, padding: int) -> Array:
        return jax.lax.platform_dependent(
            x,
            weight,
            cpu=functools.partial(_windows_product, stride=stride, padding=padding),
            default=functools.partial(plain, stride=stride, padding=padding),
        )

    def forward(x: Array, weight: Array, stride: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
        # The residual is x itself, not its kernel x kernel shifted copies.
        return tuned(x, weight, stride, padding), (x, weight)

    def backward(stride: int, padding: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        return jax.lax.platform_dependent(
            *kept,
            gradient,
            cpu=_gradients(functools.partial(_windows_product, stride=stride, padding=padding)),
            default=_gradients(functools.partial(plain, stride=stride, padding=padding)),
        )

    tuned.defvjp(forward, backward)

    @functools.wraps(plain)
    def convolution(x: Array, weight: Array, stride: int, padding: int) -> Array:
        return tuned(x, weight, stride, padding) if TUNED else plain(x, weight, stride, padding)

    return convolution


def _gradients(convolution: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    # A convolution is linear in each of its arguments, so its gradients are transposes and need no forward pass.
    def gradients(x: Array, weight: Array, gradient: Array) -> tuple[Array, Array]:
        (dx,) = jax.linear_transpose(lambda x: convolution(x, weight), x)(gradient)
        (dweight,) = jax.linear_transpose(lambda weight: convolution(x, weight), weight)(gradient)
        return dx, dweight

    return gradients


def _windows_product(x: Array, weight: Array, stride: int, padding: int) -> Array:
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
