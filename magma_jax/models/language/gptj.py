"""GPT-J: a decoder with rotary positions whose attention and MLP run in parallel (Wang and Komatsuzaki, 2021).

One block: ``h = LayerNorm(x); x + attention(h) + mlp(h)``. Embedding table and head are separate, and the head may
have more rows than the table.
"""

import dataclasses
from typing import ClassVar, Literal

from magma_jax.models.language.decoder import DecoderConfig, Head, block_config, check_heads
from magma_jax.nn.rotary import RotaryConfig, check_rotary_dim
from magma_jax.nn.transformer.config import TrunkConfig


@dataclasses.dataclass(frozen=True)
class GPTJConfig(DecoderConfig):
    """Sizes of a GPT-J language model; the defaults are GPT-J-6B with MAGMA's ``<|image|>`` row.

    Attributes:
        vocab_rows: rows of the embedding table.
        head_rows: rows of the head; ids beyond the embedding table are never sampled.
        context_length: positions the model was trained on, in tokens.
        rotary_dim: features per head that rotary embedding rotates.
        rotary_base: base of the rotary frequencies, ``theta``.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int = 28
    width: int = 4096
    heads: int = 16
    rotary_dim: int = 64
    feed_forward: int = 16384
    vocab_rows: int = 50258
    head_rows: int = 50400
    context_length: int = 2048
    rotary_base: float = 10_000.0
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.02
    dtype: str = "float32"
    kind: Literal["gptj"] = "gptj"
    head: ClassVar[Head] = "bias"

    def __post_init__(self):
        check_heads(self)
        check_rotary_dim(self.rotary_dim, self.width // self.heads)

    def trunk(self) -> TrunkConfig:
        """Attention without biases, rotary embedding in neighbouring pairs."""
        rotary = RotaryConfig(features=self.rotary_dim, base=self.rotary_base, interleaved=True)
        block = block_config(self, residual="shared", biases=("mlp_in", "mlp_out"), rotary=rotary)
        return TrunkConfig(block=block, layers=self.layers)
