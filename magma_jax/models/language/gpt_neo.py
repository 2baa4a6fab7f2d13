"""GPT-Neo: as GPT-2, but every other layer sees only the last 256 positions, and scores are not scaled
(Black et al., 2021)."""

import dataclasses
import itertools
from typing import Any, Literal

from flax import nnx

from magma_jax.models.language.decoder import Activation, Attention, Decoder, check_heads, linear


@dataclasses.dataclass(frozen=True)
class GPTNeoConfig:
    """Sizes of a GPT-Neo language model; the defaults are ``EleutherAI/gpt-neo-125m``.

    Attributes:
        vocab_rows: rows of the embedding table, which is the head too.
        context_length: rows of the table of positions; a longer sequence is an error.
        attention: what the layers see, repeated over them: all positions, or the last ``window``.
        window: positions that a query of a local layer sees, itself included.
        activation: between the MLP's layers.
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

    def __post_init__(self):
        check_heads(self)
        if not self.attention:
            raise ValueError("language model: attention names no kind of layer; give ('global', 'local')")
        if self.window < 1:
            raise ValueError(f"language model: window must be at least 1, got {self.window}")

    @property
    def head_rows(self) -> int:
        """Rows of the head: those of the table."""
        return self.vocab_rows


GPT_NEO_SIZES = {
    "EleutherAI/gpt-neo-125m": GPTNeoConfig(),
    "EleutherAI/gpt-neo-1.3B": GPTNeoConfig(24, 2048, 16, 8192),
    "EleutherAI/gpt-neo-2.7B": GPTNeoConfig(32, 2560, 20, 10240),
}


class GPTNeoAttention(Attention):
    """Separate projections, a bias in the last only; scores as they are."""

    scaled = False

    def __init__(self, config: GPTNeoConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj = (
            linear(config, config.width, config.width, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.out_proj = linear(config, config.width, config.width, rngs=rngs)

    def heads_of(self, x, rotary):
        return tuple(
            projection(x).reshape(*x.shape[:2], self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )


class GPTNeo(Decoder):
    """GPT-Neo; ``options`` are adapters and random keys, see ``Decoder``."""

    def __init__(self, config: GPTNeoConfig, **options: Any):
        kinds = itertools.islice(itertools.cycle(config.attention), config.layers)
        self.windows = tuple(config.window if kind == "local" else None for kind in kinds)
        kind = {"residual": "sequential", "activation": config.activation, "learned_positions": True}
        super().__init__(config, GPTNeoAttention, **kind, **options)
