"""LoRA (Hu et al., 2022): a learned matrix of low rank beside a frozen one, ``y = W x + alpha / rank * B A x``."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from magma_jax.config import check_sizes
from magma_jax.nn.layers import Linear, dropout, fan_in_uniform, zeros
from magma_jax.nn.modules import AdapterParam
from magma_jax.typing import Array, Float, PRNGKey

# Matrices of a block, by their names in parameter paths. Those that a model lacks are refused.
Target = Literal["q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "c_fc", "c_gate", "c_proj"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA of a language model.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the product is scaled by alpha / rank, or alpha / sqrt(rank) with ``rank_stabilized``.
        targets: matrices with a LoRA, in every layer.
        dropout: dropout rate of its input in training.
        rank_stabilized: see ``alpha`` (Kalajdzievski, 2023).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self):
        check_sizes(self, "rank")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora: targets must name matrices, each once; got {', '.join(self.targets) or 'none'}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is a rate below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoraLinear(Linear):
    """A linear layer with a LoRA, which starts as zero; ``remove`` leaves the plain layer, bit for bit."""

    lora: nnx.Module | None

    def __init__(self, in_features: int, out_features: int, *, lora: LoraConfig, rngs: nnx.Rngs, **options: Any):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.lora = _Lora(in_features, out_features, lora, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "... in"],
        preferred_element_type: DTypeLike | None = None,
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "... out"]:
        y = super().__call__(x, preferred_element_type)
        return y if self.lora is None else y + self.lora(x, dropout_key).astype(y.dtype)

    def remove(self) -> None:
        """Removes the LoRA."""
        self.lora = None


class _Lora(nnx.Module):
    """The two factors, as PEFT initialises them: A uniform, B zero."""

    def __init__(self, in_features: int, out_features: int, config: LoraConfig, *, rngs: nnx.Rngs):
        self.config = config
        options: dict[str, Any] = {"param": AdapterParam, "use_bias": False, "rngs": rngs}
        self.down = Linear(in_features, config.rank, weight_init=fan_in_uniform, **options)
        self.up = Linear(config.rank, out_features, weight_init=zeros, **options)

    def __call__(self, x: Float[Array, "... in"], dropout_key: PRNGKey | None) -> Float[Array, "... out"]:
        y = self.up(self.down(dropout(x, self.config.dropout, dropout_key)))
        return y * jnp.asarray(self.config.scale, y.dtype)


def apply_linear(layer: Linear, x: Float[Array, "... in"], dropout_key: PRNGKey | None) -> Float[Array, "... out"]:
    """A linear layer with or without a LoRA, to whose dropout alone the key applies."""
    return layer(x, dropout_key=dropout_key) if isinstance(layer, LoraLinear) else layer(x)
