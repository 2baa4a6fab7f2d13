"""Qwen2, Qwen2.5 and Qwen3 (Yang et al., 2024; Qwen team, 2025): Llama's layer with biases of queries, keys and values,
and in Qwen3, instead of these, norms of queries and keys."""

import dataclasses
from typing import Literal

from magma_jax.models.language.gated import GatedConfig
from magma_jax.nn.transformer.config import TrunkConfig


@dataclasses.dataclass(frozen=True)
class Qwen2Config(GatedConfig):
    """Sizes of a Qwen2 or Qwen2.5, see ``GatedConfig``; the defaults are ``Qwen/Qwen2.5-0.5B``."""

    layers: int = 24
    width: int = 896
    heads: int = 14
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 4864
    vocab_rows: int = 151_936
    context_length: int = 32768
    tied: bool = True
    rotary_base: float = 1_000_000.0
    kind: Literal["qwen2"] = "qwen2"

    def trunk(self) -> TrunkConfig:
        """Llama's layers, with biases of queries, keys and values."""
        return TrunkConfig(block=self.block(biases=("qkv",)), layers=self.layers)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(GatedConfig):
    """Sizes of a Qwen3, see ``GatedConfig``; the defaults are ``Qwen/Qwen3-0.6B``."""

    layers: int = 28
    width: int = 1024
    heads: int = 16
    kv_heads: int = 8
    head_size: int = 128
    feed_forward: int = 3072
    vocab_rows: int = 151_936
    context_length: int = 40960
    tied: bool = True
    rotary_base: float = 1_000_000.0
    kind: Literal["qwen3"] = "qwen3"

    def trunk(self) -> TrunkConfig:
        """Llama's layers, with a norm over each head of queries and keys."""
        return TrunkConfig(block=self.block(qk_norm="head"), layers=self.layers)


QWEN2_SIZES = {
    "Qwen/Qwen2.5-0.5B": Qwen2Config(),
    "Qwen/Qwen2.5-1.5B": Qwen2Config(28, 1536, 12, 2, 128, 8960, context_length=131_072),
    "Qwen/Qwen2.5-3B": Qwen2Config(36, 2048, 16, 2, 128, 11008),
    "Qwen/Qwen2.5-7B": Qwen2Config(28, 3584, 28, 4, 128, 18944, 152_064, 131_072, tied=False),
}
QWEN3_SIZES = {
    "Qwen/Qwen3-0.6B": Qwen3Config(),
    "Qwen/Qwen3-1.7B": Qwen3Config(28, 2048, 16, 8, 128, 6144),
    "Qwen/Qwen3-4B": Qwen3Config(36, 2560, 32, 8, 128, 9728),
    "Qwen/Qwen3-8B": Qwen3Config(36, 4096, 32, 8, 128, 12288, tied=False),
}
