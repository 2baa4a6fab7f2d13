"""GPT-Neo: GPT-2 with local attention (256 positions) in every other layer and unscaled scores (Black et al., 2021)."""

import dataclasses
import itertools
from typing import ClassVar, Literal

from magma_jax.models.language.decoder import Activation, DecoderConfig, Head, block_config, check_heads
from magma_jax.nn.transformer.config import PositionTable, TrunkConfig


@dataclasses.dataclass(frozen=True)
class GPTNeoConfig(DecoderConfig):
    """Sizes of a GPT-Neo language model; the defaults are ``EleutherAI/gpt-neo-125m``.

    Attributes:
        vocab_rows: rows of the embedding table, which is also the head.
        context_length: rows of the position table; a longer sequence is an error.
        attention: kinds of layers, repeated: ``global`` sees all positions, ``local`` the last ``window``.
        window: positions that a query of a local layer sees, itself included.
        activation: activation of the MLP.
        embedding_std: standard deviation of a fresh embedding table.
        dtype: dtype the weights are stored in.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    vocab_rows: int = 50257
    context_length: int = 2048
    attention: tuple[Literal["global", "local"], ...] = ("global", "local")
    window: int = 256
    activation: Activation = "gelu_tanh"
    layernorm_eps: float = 1e-5
    embedding_std: float = 0.02
    dtype: str = "float32"
    kind: Literal["gpt_neo"] = "gpt_neo"
    head: ClassVar[Head] = "tied"

    def __post_init__(self):
        check_heads(self)
        if not self.attention:
            raise ValueError("language model: attention names no kind of layer; give ('global', 'local')")
        if self.window < 1:
            raise ValueError(f"language model: window must be at least 1, got {self.window}")

    @property
    def head_rows(self) -> int:
        """Rows of the head, which is the embedding table."""
        return self.vocab_rows

    def trunk(self) -> TrunkConfig:
        """Separate projections, with a bias in the output only; unscaled scores; learned positions."""
        biases = ("attention_out", "mlp_in", "mlp_out")
        kinds = itertools.islice(itertools.cycle(self.attention), self.layers)
        return TrunkConfig(
            block=block_config(self, biases=biases, activation=self.activation, score_divisor=1.0),
            layers=self.layers,
            positions=PositionTable(length=self.context_length),
            windows=tuple(self.window if kind == "local" else None for kind in kinds),
        )


GPT_NEO_SIZES = {
    "EleutherAI/gpt-neo-125m": GPTNeoConfig(),
    "EleutherAI/gpt-neo-1.3B": GPTNeoConfig(24, 2048, 16, 8192),
    "EleutherAI/gpt-neo-2.7B": GPTNeoConfig(32, 2560, 20, 10240),
}
