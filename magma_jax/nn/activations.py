"""Activations by name, one table for all models."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from magma_jax.typing import Array, Float

ActivationName = Literal[
    "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu", "geglu", "geglu_tanh"
]  # the keys of ACTIVATIONS


class Activation(NamedTuple):
    """A function, and whether its result gates a second projection: ``f(W x) * (V x)`` (Shazeer, 2020)."""

    function: Callable[[Array], Array]
    gated: bool = False


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


_gelu = functools.partial(jax.nn.gelu, approximate=False)
_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu),
    "gelu": Activation(_gelu),
    "gelu_tanh": Activation(_gelu_tanh),
    "quick_gelu": Activation(quick_gelu),
    "silu": Activation(jax.nn.silu),
    "swiglu": Activation(jax.nn.silu, gated=True),
    "geglu": Activation(_gelu, gated=True),
    "geglu_tanh": Activation(_gelu_tanh, gated=True),
}
