"""GPT-J: a decoder with rotary positions whose attention and MLP run in parallel (Wang and Komatsuzaki, 2021).

One block: ``h = LayerNorm(x); x + attention(h) + mlp(h)``. Embedding table and head are separate, and the head may
have more rows than the table.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx

from magma_jax.models.language.decoder import Attention, Decoder, check_heads, linear
from magma_jax.nn.rotary import apply_rotary, check_rotary_dim


@dataclasses.dataclass(frozen=True)
class GPTJConfig:
    """Sizes of a GPT-J language model; the defaults are GPT-J-6B with MAGMA's ``<|image|>`` row.

    Attributes:
        vocab_rows: rows of the embedding table.
        head_rows: rows of the head; ids that the table lacks are never sampled.
        context_length: positions the model was trained on, in tokens.
        rotary_dim: features of each head that rotary embedding turns.
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

    def __post_init__(self):
        check_heads(self)
        check_rotary_dim(self.rotary_dim, self.width // self.heads)


class GPTJAttention(Attention):
    """Rotary positions on interleaved pairs, no biases."""

    def __init__(self, config: GPTJConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear(config, config.width, config.width, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def heads_of(self, x, rotary):
        split_heads = (*x.shape[:2], self.heads, -1)
        q = apply_rotary(self.q_proj(x).reshape(split_heads), *rotary)
        k = apply_rotary(self.k_proj(x).reshape(split_heads), *rotary)
        return q, k, self.v_proj(x).reshape(split_heads)


class GPTJ(Decoder):
    """GPT-J; ``options`` are adapters and random keys, see ``Decoder``."""

    def __init__(self, config: GPTJConfig, **options: Any):
        self.rotary = (config.rotary_dim, config.rotary_base)
        super().__init__(config, GPTJAttention, residual="shared", head="bias", **options)
