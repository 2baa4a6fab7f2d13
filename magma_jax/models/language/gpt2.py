"""GPT-2: learned positions, sequential attention and MLP, tied head (Radford et al., 2019)."""

import dataclasses
from typing import ClassVar, Literal

from magma_jax.models.language.decoder import Activation, DecoderConfig, Head, block_config, check_heads
from magma_jax.nn.transformer.config import PositionTable, TrunkConfig


@dataclasses.dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """Sizes of a GPT-2 language model; the defaults are the smallest published one, ``gpt2``.

    Attributes:
        vocab_rows: rows of the embedding table, which is also the head.
        context_length: rows of the position table; a longer sequence is an error.
        activation: activation of the MLP.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    vocab_rows: int = 50257
    context_length: int = 1024
    activation: Activation = "gelu_tanh"
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.02
    dtype: str = "float32"
    kind: Literal["gpt2"] = "gpt2"
    head: ClassVar[Head] = "tied"

    def __post_init__(self):
        check_heads(self)

    @property
    def head_rows(self) -> int:
        """Rows of the head, which is the embedding table."""
        return self.vocab_rows

    def trunk(self) -> TrunkConfig:
        """Joint projection of queries, keys and values; learned positions."""
        block = block_config(self, projections="joint", activation=self.activation)
        return TrunkConfig(block=block, layers=self.layers, positions=PositionTable(length=self.context_length))


# Radford et al. (2019), table 2: parameters 124M, 355M, 774M, 1558M.
GPT2_SIZES = {
    name: GPT2Config(layers, width, width // 64, 4 * width)
    for name, layers, width in [
        ("gpt2", 12, 768),
        ("gpt2-medium", 24, 1024),
        ("gpt2-large", 36, 1280),
        ("gpt2-xl", 48, 1600),
    ]
}
