"""What the configs of today's language models share: Llama's layer (Touvron et al., 2023), which others vary.

RMSNorm before attention and MLP, no biases, rotary embedding in half-split pairs, groups of query heads that share keys
and values, and an MLP gated by SiLU.
"""

import dataclasses
from typing import Any

from magma_jax.config import check_sizes
from magma_jax.models.language.decoder import DecoderConfig, Head, check_heads
from magma_jax.nn.rotary import RotaryConfig, RotaryScaling
from magma_jax.nn.transformer.config import BlockConfig, NormConfig, TrunkConfig


@dataclasses.dataclass(frozen=True)
class GatedConfig(DecoderConfig):
    """Sizes of a language model with Llama's layer; each kind inherits from this class.

    Attributes:
        kv_heads: heads of keys and values, each shared by ``heads / kv_heads`` query heads.
        head_size: features per head; heads need not add up to the width.
        vocab_rows: rows of the embedding table, and of the head.
        context_length: positions the model was trained on, in tokens.
        tied: whether the embedding table is also the head.
        rotary_base: base of the rotary embedding.
        rotary_scaling: frequency scaling of the rotary embedding; None for none.
        layernorm_eps: added to the mean square in every norm.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocab_rows: int
    context_length: int
    tied: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    layernorm_eps: float = 1e-6
    embedding_std: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        check_heads(self, divide=False)
        check_sizes(self, "kv_heads", "head_size")
        # A head that cannot be rotated, and heads that cannot be shared, are refused by the block.
        self.trunk()

    @property
    def head(self) -> Head:
        """The embedding table, or a matrix without bias."""
        return "tied" if self.tied else "no_bias"

    @property
    def head_rows(self) -> int:
        """Rows of the head, as many as the embedding table has."""
        return self.vocab_rows

    def trunk(self) -> TrunkConfig:
        """Llama's layers."""
        return TrunkConfig(block=self.block(), layers=self.layers)

    def block(self, **changes: Any) -> BlockConfig:
        """Llama's layer; ``changes`` override its settings."""
        settings = {
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "norm": NormConfig(kind="rms", eps=self.layernorm_eps),
            "biases": (),
            "activation": "swiglu",
            "rotary": self.rotary(),
            "dtype": self.dtype,
        }
        sizes = {"width": self.width, "heads": self.heads, "feed_forward": self.feed_forward}
        return BlockConfig(**sizes, **(settings | changes))

    def rotary(self) -> RotaryConfig:
        """Rotary embedding of whole heads."""
        return RotaryConfig(features=self.head_size, base=self.rotary_base, scaling=self.rotary_scaling)
