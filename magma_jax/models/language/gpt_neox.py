"""GPT-NeoX and Pythia: partial rotary embedding in half-split pairs, two LayerNorms per layer, untied head (Black et
al., 2022; Biderman et al., 2023)."""

import dataclasses
from typing import ClassVar, Literal

from magma_jax.models.language.decoder import Activation, DecoderConfig, Head, block_config, check_heads
from magma_jax.nn.rotary import RotaryConfig, check_rotary_dim
from magma_jax.nn.transformer.config import PLACES, TrunkConfig


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """Sizes of a GPT-NeoX language model; the defaults are ``EleutherAI/pythia-70m``.

    Attributes:
        rotary_dim: features per head that rotary embedding rotates.
        rotary_base: base of the rotary frequencies, ``theta``.
        vocab_rows: rows of the embedding table, and of the head.
        context_length: positions the model was trained on, in tokens.
        parallel_residual: whether attention and MLP run in parallel (as published) or in sequence.
        attention_bias: whether attention's projections have biases.
        activation: activation of the MLP.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int = 6
    width: int = 512
    heads: int = 8
    rotary_dim: int = 16
    feed_forward: int = 2048
    vocab_rows: int = 50304
    context_length: int = 2048
    rotary_base: float = 10_000.0
    parallel_residual: bool = True
    attention_bias: bool = True
    activation: Activation = "gelu"
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.02
    dtype: str = "float32"
    kind: Literal["gpt_neox"] = "gpt_neox"
    head: ClassVar[Head] = "no_bias"

    def __post_init__(self):
        check_heads(self)
        check_rotary_dim(self.rotary_dim, self.width // self.heads)

    @property
    def head_rows(self) -> int:
        """Rows of the head, as many as the embedding table has."""
        return self.vocab_rows

    def trunk(self) -> TrunkConfig:
        """Joint projection, head by head; partial rotary embedding in half-split pairs."""
        block = block_config(
            self,
            residual="parallel" if self.parallel_residual else "sequential",
            projections="joint_by_head",
            biases=PLACES if self.attention_bias else ("mlp_in", "mlp_out"),
            activation=self.activation,
            rotary=RotaryConfig(features=self.rotary_dim, base=self.rotary_base),
        )
        return TrunkConfig(block=block, layers=self.layers)


def _published(layers: int, width: int, heads: int, rows: int, activation: Activation = "gelu") -> GPTNeoXConfig:
    return GPTNeoXConfig(layers, width, heads, width // heads // 4, 4 * width, rows, activation=activation)


# Biderman et al. (2023), table 1. Embedding tables of 50,254 or 50,257 tokens were padded for their training hardware.
GPT_NEOX_SIZES = {
    "EleutherAI/pythia-70m": _published(6, 512, 8, 50304),
    "EleutherAI/pythia-160m": _published(12, 768, 12, 50304),
    "EleutherAI/pythia-410m": _published(24, 1024, 16, 50304),
    "EleutherAI/pythia-1b": _published(16, 2048, 8, 50304),
    "EleutherAI/pythia-1.4b": _published(24, 2048, 16, 50304),
    "EleutherAI/pythia-2.8b": _published(32, 2560, 32, 50304),
    "EleutherAI/pythia-6.9b": _published(32, 4096, 32, 50432),
    "EleutherAI/pythia-12b": _published(36, 5120, 40, 50688),
    "EleutherAI/gpt-neox-20b": _published(44, 6144, 64, 50432, "gelu_tanh"),
}
