"""Bottleneck adapters: the small trained modules inside the frozen language model (paper, section 3.1).

With ``A(x) = W_up act(W_down x)``, ``x`` the input of the adapted module and ``y`` its output:

    normal            y + A(y)
    parallel          y + A(x)
    scaled_parallel   y + s A(x), s one learned scalar
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from magma_jax.nn.activations import ACTIVATIONS
from magma_jax.nn.layers import LayerNorm, Linear, clipped_normal, zeros
from magma_jax.nn.modules import AdapterParam
from magma_jax.typing import Array, Float

AdapterActivation = Literal["relu", "gelu", "silu"]


def _function(name: AdapterActivation) -> Callable[[Array], Array]:
    # GELU is the tanh form here, as in all published adapters that use it.
    return ACTIVATIONS["gelu_tanh" if name == "gelu" else name].function


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """One adapter.

    Attributes:
        kind: where the adapter reads and how it is added, see the module's docstring.
        downsample_factor: model width divided by bottleneck width; the bottleneck width is rounded down.
        layernorm: whether a LayerNorm precedes the bottleneck.
        activation: between the two linear layers; ``gelu`` is the tanh approximation. The original uses relu.
        init: ``original`` fills both linear layers with N(0, 1e-3), clipped at two sigma; ``zero_up`` sets the second
            to zero and keeps the first at full scale, which starts at the same function and learns in far fewer steps.
    """

    kind: Literal["normal", "parallel", "scaled_parallel"] = "normal"
    downsample_factor: int = 4
    layernorm: bool = False
    activation: AdapterActivation = "relu"
    init: Literal["original", "zero_up"] = "original"


class Adapter(nnx.Module):
    """Bottleneck adapter around a module with input ``x`` and output ``y``, both of width D."""

    def __init__(self, width: int, config: AdapterConfig, *, rngs: nnx.Rngs):
        if not 0 < config.downsample_factor <= width:
            raise ValueError(f"adapter downsample_factor {config.downsample_factor} leaves nothing of width {width}")
        self.config = config
        bottleneck = width // config.downsample_factor
        # With either init the adapted model starts as the unadapted one (approximately so in the original).
        small: dict[str, Any] = {"weight_init": clipped_normal(1e-3), "bias_init": clipped_normal(1e-3)}
        zero: dict[str, Any] = {"weight_init": zeros}
        down, up = (small, small) if config.init == "original" else ({}, zero)
        self.ln = LayerNorm(width, param=AdapterParam) if config.layernorm else None
        self.down = Linear(width, bottleneck, param=AdapterParam, rngs=rngs, **down)
        self.up = Linear(bottleneck, width, param=AdapterParam, rngs=rngs, **up)
        self.scale = AdapterParam(jnp.ones((1,))) if config.kind == "scaled_parallel" else None

    def __call__(self, x: Float[Array, "B S D"], y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        h = y if self.config.kind == "normal" else x
        if self.ln is not None:
            h = self.ln(h)
        h = self.up(_function(self.config.activation)(self.down(h)))
        if self.scale is not None:
            h = h * self.scale[...].astype(h.dtype)
        return y + h


def is_adapter(path: str) -> bool:
    """Whether a parameter path is that of an adapter or a LoRA."""
    return "_adapter/" in path or "/lora/" in path
