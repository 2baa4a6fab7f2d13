"""GPT-J: a decoder with rotary positions whose attention and MLP run in parallel, with room for adapters.

One block: ``h = LayerNorm(x); x + attention(h) + mlp(h)``, each branch followed by its adapter if it has one
(Wang and Komatsuzaki, 2021; adapters: MAGMA, section 3.1). Embedding table and head are separate, and the head may
have more rows than the table.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.nn.adapters import Adapter, AdapterConfig
from magma_jax.nn.attention import causal_mask, dot_product_attention
from magma_jax.nn.layers import Embedding, LayerNorm, Linear, normal
from magma_jax.nn.modules import LanguageParam
from magma_jax.nn.rotary import apply_rotary, rotary_table
from magma_jax.nn.stack import Remat, scan, stack
from magma_jax.typing import Array, Bool, Float, Int


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
        if self.width % self.heads:
            raise ValueError(f"language model: {self.heads} heads do not divide the width {self.width}")
        if self.rotary_dim % 2 or self.rotary_dim > self.width // self.heads:
            raise ValueError(f"language model: rotary_dim {self.rotary_dim} must be even and fit in one head")


class KVCache(NamedTuple):
    """Keys (after rotary) and values of every layer: (L, B, T, H, K) each, T slots, slot = position."""

    key: Array
    value: Array


class BlockOutput(NamedTuple):
    """Everything a block computes; what nobody reads is removed by the compiler."""

    ln_1: Array  # (B, S, D) shared LayerNorm
    attn_inner: Array  # (B, S, D) attention without its adapter
    attn: Array  # (B, S, D) attention with its adapter
    mlp_inner: Array  # (B, S, D) MLP without its adapter
    mlp: Array  # (B, S, D) MLP with its adapter
    out: Array  # (B, S, D)
    attentions: Array  # (B, H, S, T) attention weights, fp32
    key: Array  # (B, S, H, K) after rotary
    value: Array  # (B, S, H, K)


class LMOutput(NamedTuple):
    """Result of ``GPTJ.__call__``; ``collected`` holds what was asked for, stacked over layers."""

    hidden: Array  # (B, S, D) after the final LayerNorm
    cache: KVCache | None
    collected: dict[str, Array]


class Attention(nnx.Module):
    """Multi-head attention with rotary positions and no biases."""

    def __init__(self, config: GPTJConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(
                config.width,
                config.width,
                param=LanguageParam,
                use_bias=False,
                weight_init=normal(0.02),
                dtype=jnp.dtype(config.dtype),
                rngs=rngs,
            )
            for _ in range(4)
        )

    def __call__(self, x, mask, rotary, store):
        """``store(key, value)`` puts new keys and values where they belong and returns those to attend to."""
        split_heads = (*x.shape[:2], self.heads, -1)
        q = apply_rotary(self.q_proj(x).reshape(split_heads), *rotary)
        k = apply_rotary(self.k_proj(x).reshape(split_heads), *rotary)
        v = self.v_proj(x).reshape(split_heads)
        out, weights = dot_product_attention(q, *store(k, v), mask)
        return self.out_proj(out.reshape(x.shape)), weights, k, v


class MLP(nnx.Module):
    """Two linear layers with tanh-GELU between them."""

    def __init__(self, config: GPTJConfig, *, rngs: nnx.Rngs):
        options = {"param": LanguageParam, "weight_init": normal(0.02), "rngs": rngs}
        options["dtype"] = jnp.dtype(config.dtype)
        self.c_fc = Linear(config.width, config.feed_forward, **options)
        self.c_proj = Linear(config.feed_forward, config.width, **options)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """One layer: parallel attention and MLP on a shared LayerNorm, with optional adapters."""

    def __init__(
        self,
        config: GPTJConfig,
        mlp_adapter: AdapterConfig | None,
        attn_adapter: AdapterConfig | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.ln_1 = _layernorm(config)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_adapter = mlp_adapter and Adapter(config.width, mlp_adapter, rngs=rngs)
        self.attn_adapter = attn_adapter and Adapter(config.width, attn_adapter, rngs=rngs)

    def __call__(self, x, mask, rotary, store) -> BlockOutput:
        h = self.ln_1(x)
        attn_inner, attentions, key, value = self.attn(h, mask, rotary, store)
        attn = attn_inner if self.attn_adapter is None else self.attn_adapter(h, attn_inner)
        mlp_inner = self.mlp(h)
        mlp = mlp_inner if self.mlp_adapter is None else self.mlp_adapter(h, mlp_inner)
        return BlockOutput(h, attn_inner, attn, mlp_inner, mlp, x + attn + mlp, attentions, key, value)


class GPTJ(nnx.Module):
    """GPT-J from embeddings to hidden states; ``embed`` before it, ``logits`` after it."""

    def __init__(
        self,
        config: GPTJConfig,
        *,
        mlp_adapter: AdapterConfig | None = None,
        attn_adapter: AdapterConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.wte = Embedding(
            config.vocab_rows,
            config.width,
            param=LanguageParam,
            weight_init=normal(config.embedding_std),
            dtype=dtype,
            rngs=rngs,
        )
        self.layers = stack(lambda rngs: Block(config, mlp_adapter, attn_adapter, rngs=rngs), config.layers, rngs)
        self.ln_f = _layernorm(config)
        self.lm_head = Linear(
            config.width,
            config.head_rows,
            param=LanguageParam,
            weight_init=normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )

    def embed(self, ids: Int[Array, "B S"], dtype: Any = jnp.float32) -> Float[Array, "B S D"]:
        """Word embeddings; ids must be below ``vocab_rows`` (JAX clamps what is not)."""
        return self.wte(ids, dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits of the final hidden states, also where these are of lower precision."""
        weight = self.lm_head.weight[...].astype(hidden.dtype)
        logits = jnp.einsum("...i,oi->...o", hidden, weight, preferred_element_type=jnp.float32)
        return logits + self.lm_head.bias[...].astype(jnp.float32)

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache with room for positions 0 to ``slots`` - 1 of ``batch`` rows."""
        config = self.config
        shape = (config.layers, batch, slots, config.heads, config.width // config.heads)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        *,
        positions: Int[Array, "B S"] | None = None,
        mask: Bool[Array, "#B #S T"] | None = None,
        cache: KVCache | None = None,
        collect: tuple[str, ...] = (),
        remat: Remat = "none",
    ) -> LMOutput:
        """Runs all layers.

        Args:
            embeddings: word embeddings and image prefixes in one sequence.
            positions: position of every embedding, per row (default 0, 1, ...). With a cache they are also the
                slots that the new keys and values are written to.
            mask: what each query may see (default causal); with a cache, T is its number of slots.
            cache: keys and values of earlier positions. Slots after a query's position are never seen, so right
                padding may leave garbage there; later tokens overwrite it.
            collect: fields of ``BlockOutput`` to return for every layer, with a leading axis L.
            remat: what the backward pass recomputes, see ``nn.stack``.
        """
        batch, length, _ = embeddings.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if mask is None:
            keys = positions if cache is None else jnp.arange(cache.key.shape[2])
            mask = causal_mask(positions, keys)
        rotary = rotary_table(positions, self.config.rotary_dim, self.config.rotary_base)

        def body(layer, carry, index):
            x, cache = carry
            updated = cache

            def store(key, value):
                nonlocal updated
                if cache is None:
                    return key, value
                # In the loop's carry and written in place: stacking per-layer caches would copy them every step.
                rows = jnp.arange(batch)[:, None]
                updated = KVCache(
                    cache.key.at[index, rows, positions].set(key.astype(cache.key.dtype)),
                    cache.value.at[index, rows, positions].set(value.astype(cache.value.dtype)),
                )
                return updated.key[index], updated.value[index]

            output = layer(x, mask, rotary, store)
            return (output.out, updated), {name: getattr(output, name) for name in collect}

        (x, cache), collected = scan(
            self.layers, body, (embeddings, cache), jnp.arange(self.config.layers), remat=remat
        )
        return LMOutput(self.ln_f(x), cache, collected)

    def remove_adapters(self) -> None:
        """Removes every adapter: what is left computes exactly what the language model computed before."""
        self.layers.mlp_adapter = None
        self.layers.attn_adapter = None


def _layernorm(config: GPTJConfig) -> LayerNorm:
    return LayerNorm(config.width, param=LanguageParam, eps=config.layernorm_eps, dtype=jnp.dtype(config.dtype))
