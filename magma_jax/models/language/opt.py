"""OPT (Zhang et al., 2022): GPT-2's layer with ReLU; learned positions start at row 2 of their table."""

import dataclasses
from typing import ClassVar, Literal

from magma_jax.models.language.decoder import Activation, DecoderConfig, Head, block_config, check_heads
from magma_jax.nn.transformer.config import PositionTable, TrunkConfig


@dataclasses.dataclass(frozen=True)
class OPTConfig(DecoderConfig):
    """Sizes of an OPT language model; the defaults are the smallest published one, ``facebook/opt-125m``.

    Attributes:
        vocab_rows: rows of the embedding table, which is also the head.
        context_length: rows of the position table, without the two unused ones; a longer sequence is an error.
        activation: activation of the MLP.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    vocab_rows: int = 50272
    context_length: int = 2048
    activation: Activation = "relu"
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.02
    dtype: str = "float32"
    kind: Literal["opt"] = "opt"
    head: ClassVar[Head] = "tied"

    def __post_init__(self):
        check_heads(self)

    @property
    def head_rows(self) -> int:
        """Rows of the head, which is the embedding table."""
        return self.vocab_rows

    def trunk(self) -> TrunkConfig:
        """Biases everywhere; learned positions."""
        positions = PositionTable(length=self.context_length, offset=2)
        return TrunkConfig(
            block=block_config(self, activation=self.activation), layers=self.layers, positions=positions
        )


# Zhang et al. (2022), table 1, without 350M (norms after each part, narrower embeddings) and 175B (not on the hub).
OPT_SIZES = {
    f"facebook/opt-{name}": OPTConfig(layers, width, heads, 4 * width)
    for name, layers, width, heads in [
        ("125m", 12, 768, 12),
        ("1.3b", 24, 2048, 32),
        ("2.7b", 32, 2560, 32),
        ("6.7b", 32, 4096, 32),
        ("13b", 40, 5120, 40),
        ("30b", 48, 7168, 56),
        ("66b", 64, 9216, 72),
    ]
}
