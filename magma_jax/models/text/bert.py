"""BERT's encoder (Devlin et al., 2018), as sentence encoders use it: the mean of its outputs is the text's vector."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.config import check_sizes
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.layers import Embedding, LayerNorm, Linear, normal
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import EncoderParam
from magma_jax.nn.stack import scan, stack
from magma_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT; the defaults are those of all-MiniLM-L6-v2.

    Attributes:
        context_length: rows of the position table.
        eps: added to the variance in every LayerNorm.
    """

    layers: int = 6
    width: int = 384
    heads: int = 12
    feed_forward: int = 1536
    vocab_rows: int = 30_522
    context_length: int = 512
    eps: float = 1e-12

    def __post_init__(self):
        check_sizes(self, "layers", "width", "heads", "feed_forward", "vocab_rows", "context_length")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")


class BertBlock(nnx.Module):
    """Attention and MLP, each followed by the norm of its sum with its input."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.heads, width = config.heads, config.width
        options = {"param": EncoderParam, "weight_init": normal(0.02), "rngs": rngs}
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, **options) for _ in range(4))
        self.ln_1 = LayerNorm(width, param=EncoderParam, eps=config.eps)
        self.c_fc = Linear(width, config.feed_forward, **options)
        self.c_proj = Linear(config.feed_forward, width, **options)
        self.ln_2 = LayerNorm(width, param=EncoderParam, eps=config.eps)

    def __call__(self, x: Float[Array, "B S D"], mask: Mask) -> Float[Array, "B S D"]:
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        out, _ = dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        x = self.ln_1(x + self.out_proj(out.reshape(x.shape)))
        return self.ln_2(x + self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=False)))


class Bert(nnx.Module):
    """Token ids to hidden states; all tokens are of the first of its two types, since there is one text."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        options = {"param": EncoderParam, "weight_init": normal(0.02), "rngs": rngs}
        self.wte = Embedding(config.vocab_rows, config.width, **options)
        self.wpe = Embedding(config.context_length, config.width, **options)
        self.types = Embedding(2, config.width, **options)
        self.ln = LayerNorm(config.width, param=EncoderParam, eps=config.eps)
        self.layers = stack(lambda rngs: BertBlock(config, rngs=rngs), config.layers, rngs)

    def __call__(self, ids: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B S D"]:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        x = self.wte(ids, jnp.float32) + self.wpe(places, jnp.float32) + self.types(jnp.zeros_like(ids), jnp.float32)
        mask = Mask("full", lengths=lengths)
        x, _ = scan(self.layers, lambda block, x, _: (block(x, mask), None), self.ln(x), remat="none")
        return x

    def encode(self, ids: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
        """The mean hidden state of every text, of norm 1."""
        real = (jnp.arange(ids.shape[1]) < lengths[:, None]).astype(jnp.float32)[..., None]
        mean = (self(ids, lengths) * real).sum(1) / real.sum(1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
