"""What the language models share: embedding, layers with a cache and adapters, final LayerNorm, logits.

A language model is a subclass of ``Decoder`` that names its parts, and an ``Attention`` that says how an input
becomes queries, keys and values. Block, cache, loop over layers and head stand here once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from magma_jax.config import check_dtype, check_sizes
from magma_jax.nn.adapters import Adapter, AdapterConfig
from magma_jax.nn.attention import dot_product_attention
from magma_jax.nn.layers import Embedding, LayerNorm, Linear, normal, product
from magma_jax.nn.masks import Mask
from magma_jax.nn.modules import LanguageParam
from magma_jax.nn.quantized import QUANTIZED, float_dtype
from magma_jax.nn.rotary import rotary_table
from magma_jax.nn.stack import Remat, Unstacked, scan, stack
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float, Int

# Where the MLP reads. With LN_1 and LN_2 the two LayerNorms of a layer:
#   shared      x + attention(LN_1 x) + mlp(LN_1 x)
#   parallel    x + attention(LN_1 x) + mlp(LN_2 x)
#   sequential  y + mlp(LN_2 y), y = x + attention(LN_1 x)
Residual = Literal["shared", "parallel", "sequential"]

Activation = Literal["gelu", "gelu_tanh", "relu"]
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@runtime_checkable
class DecoderConfig(Protocol):
    """Fields that every language model's config has, under these names."""

    kind: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocab_rows: int  # rows of the embedding table
    head_rows: int  # rows of the head; ids that the table lacks are never sampled
    context_length: int  # positions the model was trained on, in tokens
    layernorm_eps: float
    dtype: str  # that the weights are stored in; int8 and int4 stand for the matrices, see nn.quantized


# The deepest published one has 126.
MAX_LAYERS = 10_000


class KVCache(NamedTuple):
    """Keys (after rotary) and values of every layer, T slots in each row, slot = position.

    Arrays (L, B, H, T, K); where the layers are apart, a tuple of L arrays (B, H, T, K).
    """

    key: Array | tuple[Array, ...]
    value: Array | tuple[Array, ...]

    @property
    def slots(self) -> int:
        """T."""
        return self.key[0].shape[-2]

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return self.key[0].dtype

    def rows(self, rows: Int[Array, " R"]) -> "KVCache":
        """A cache of some rows of this one, in their order; a row may be there more than once."""
        return jax.tree.map(lambda leaf: leaf[..., rows, :, :, :], self)

    def write(self, layer: Any, rows: Int[Array, " B"], positions: Int[Array, "B S"], new: "KVCache") -> "KVCache":
        """With ``new``, (B, S, H, K) each, written to a layer."""

        def written(kept: Any, new: Array) -> Any:
            if isinstance(kept, tuple):
                changed = kept[layer].at[rows[:, None], :, positions].set(new.astype(self.dtype))
                return (*kept[:layer], changed, *kept[layer + 1 :])
            arguments = (kept, layer, rows, positions, new.astype(self.dtype))
            if new.shape[1] > 1:
                return _scatter(*arguments)
            # TPUs would copy the whole cache in every layer for a scatter.
            return jax.lax.platform_dependent(*arguments, tpu=_row_by_row, default=_scatter)

        return KVCache(written(self.key, new.key), written(self.value, new.value))

    def read(self, layer: Any, rows: Int[Array, " B"] | None) -> tuple[Array, Array]:
        """Keys and values (B, H, T, K) of a layer; None for all rows."""
        if rows is None:
            return self.key[layer], self.value[layer]
        if isinstance(self.key, tuple):
            return self.key[layer][rows], self.value[layer][rows]
        return self.key[layer, rows], self.value[layer, rows]


def _scatter(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    return kept.at[layer, rows[:, None], :, positions].set(new)


def _row_by_row(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    """One new position in every row; as in a scatter, a position behind the last slot writes nothing.

    The cache keeps its layout: the compiler would choose one for these writes and copy the cache to it and back.
    """

    def write(kept: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, position, new = row
        start = (layer, index, 0, position[0], 0)
        new = new.swapaxes(0, 1)[None, None]
        old = jax.lax.dynamic_slice(kept, start, new.shape)
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(position[0] < kept.shape[3], new, old), start)
        return with_layout_constraint(kept, Layout(tuple(range(kept.ndim)))), None

    return jax.lax.scan(write, kept, (rows, positions, new))[0]


class CachedLayer(NamedTuple):
    """One layer's part of a cache, and where new keys and values go in it.

    Attributes:
        cache: of all layers. It goes through the loop over them and is written in place: stacking caches of single
            layers would copy them at every step.
        layer: number of the layer.
        rows: (B,) rows of the cache that the batch stands for; None for all, in order.
        positions: (B, S) slots of the new positions.
    """

    cache: KVCache
    layer: Any
    rows: Array | None
    positions: Array

    def extend(self, key: Float[Array, "B S H K"], value: Float[Array, "B S H K"]) -> tuple[KVCache, Array, Array]:
        """The cache with new keys and values, and all of the layer's, (B, H, T, K) each."""
        rows = jnp.arange(key.shape[0]) if self.rows is None else self.rows
        cache = self.cache.write(self.layer, rows, self.positions, KVCache(key, value))
        return cache, *cache.read(self.layer, self.rows)


class AttentionOutput(NamedTuple):
    """What attention gives a block."""

    out: Array  # (B, S, D)
    weights: Array | None  # (B, H, S, T), fp32, if they were asked for
    key: Array  # (B, S, H, K) after rotary
    value: Array  # (B, S, H, K)
    cache: KVCache | None  # with the new keys and values


class BlockOutput(NamedTuple):
    """Everything a block computes; what nobody reads is removed by the compiler."""

    ln_1: Array  # (B, S, D) input of attention
    attn_inner: Array  # (B, S, D) attention without its adapter
    attn: Array  # (B, S, D) attention with its adapter
    mlp_inner: Array  # (B, S, D) MLP without its adapter
    mlp: Array  # (B, S, D) MLP with its adapter
    out: Array  # (B, S, D)
    attentions: Array | None  # (B, H, S, T) attention weights, fp32, if they were asked for
    key: Array  # (B, S, H, K) after rotary
    value: Array  # (B, S, H, K)
    cache: KVCache | None  # of all layers, with this one's new keys and values


class LMOutput(NamedTuple):
    """Result of a language model's call.

    ``collected`` holds what was asked for, stacked over layers; ``reduced`` the last state of a ``LayerReduction``.
    """

    inputs: Array  # (B, S, D) input of the first block: the embeddings, with positions where these are learned
    hidden: Array  # (B, S, D) after the final LayerNorm
    cache: KVCache | None
    collected: dict[str, Array]
    reduced: Any


class LayerReduction(NamedTuple):
    """Something to compute along the layers, for what would take too much memory if all layers returned it.

    ``step(state, block_output)`` gives the next state; ``first`` is the state before the first layer.
    """

    step: Callable[[Any, BlockOutput], Any]
    first: Any


class Attention(nnx.Module):
    """Multi-head attention; a subclass has ``out_proj`` and gives ``heads_of``."""

    scaled = True  # scores are divided by sqrt(K)

    def heads_of(self, x: Array, rotary: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values (B, S, H, K) of an input (B, S, D)."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Mask,
        rotary: tuple[Array, Array] | None,
        cached: CachedLayer | None,
        *,
        weights: bool,
    ) -> AttentionOutput:
        q, k, v = self.heads_of(x, rotary)
        if cached is None:
            cache, keys, values = None, k.swapaxes(1, 2), v.swapaxes(1, 2)
        else:
            cache, keys, values = cached.extend(k, v)
        out, found = dot_product_attention(q, keys, values, mask, scaled=self.scaled, weights=weights)
        return AttentionOutput(self.out_proj(out.reshape(x.shape)), found, k, v, cache)


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: DecoderConfig, activation: Activation, *, rngs: nnx.Rngs):
        self.activation = activation
        self.c_fc = linear(config, config.width, config.feed_forward, rngs=rngs)
        self.c_proj = linear(config, config.feed_forward, config.width, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, each followed by its adapter if it has one (MAGMA, section 3.1)."""

    def __init__(
        self,
        config: DecoderConfig,
        attention: Attention,
        mlp_adapter: AdapterConfig | None,
        attn_adapter: AdapterConfig | None,
        *,
        residual: Residual,
        activation: Activation = "gelu_tanh",
        rngs: nnx.Rngs,
    ):
        self.residual = residual
        self.ln_1 = layernorm(config)
        self.attn = attention
        self.ln_2 = None if residual == "shared" else layernorm(config)
        self.mlp = MLP(config, activation, rngs=rngs)
        self.mlp_adapter = mlp_adapter and Adapter(config.width, mlp_adapter, rngs=rngs)
        self.attn_adapter = attn_adapter and Adapter(config.width, attn_adapter, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        mask: Mask,
        rotary: tuple[Array, Array] | None,
        cached: CachedLayer | None,
        *,
        weights: bool,
    ) -> BlockOutput:
        h = self.ln_1(x)
        attention = self.attn(h, mask, rotary, cached, weights=weights)
        attn = attention.out if self.attn_adapter is None else self.attn_adapter(h, attention.out)
        m = h if self.ln_2 is None else self.ln_2(x if self.residual == "parallel" else x + attn)
        mlp_inner = self.mlp(m)
        mlp = mlp_inner if self.mlp_adapter is None else self.mlp_adapter(m, mlp_inner)
        return BlockOutput(
            ln_1=h,
            attn_inner=attention.out,
            attn=attn,
            mlp_inner=mlp_inner,
            mlp=mlp,
            out=x + attn + mlp,
            attentions=attention.weights,
            key=attention.key,
            value=attention.value,
            cache=attention.cache,
        )


class Decoder(nnx.Module):
    """A language model from embeddings to hidden states; ``embed`` before it, ``logits`` after it.

    It has an embedding table ``wte``, stacked ``layers`` and a final LayerNorm ``ln_f``. A subclass says which
    attention its blocks have, and sets ``rotary`` where positions turn queries and keys, or ``windows``: for every
    layer how many positions a query sees, itself included, or None for all.

    Args:
        attention: of every block.
        residual: how a block adds up, see ``Block``.
        activation: between the MLP's layers.
        learned_positions: whether there is a table of positions, ``wpe``.
        head: ``lm_head`` with or without a ``bias``; ``tied`` if the embedding table is the head too, one parameter
            with two uses.
        mlp_adapter: adapter of every MLP.
        attn_adapter: the same of attention.
    """

    config: DecoderConfig
    lm_head: Linear | None = None
    wpe: Embedding | None = None
    rotary: tuple[int, float] | None = None  # features of each head that are turned, and the base
    windows: tuple[int | None, ...] | None = None

    def __init__(
        self,
        config: DecoderConfig,
        attention: Callable[..., Attention],
        *,
        residual: Residual,
        activation: Activation = "gelu_tanh",
        learned_positions: bool = False,
        head: Literal["bias", "no_bias", "tied"] = "tied",
        mlp_adapter: AdapterConfig | None = None,
        attn_adapter: AdapterConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config

        def block(rngs: nnx.Rngs) -> Block:
            options = {"residual": residual, "activation": activation, "rngs": rngs}
            return Block(config, attention(config, rngs=rngs), mlp_adapter, attn_adapter, **options)

        self.wte = embedding(config, config.vocab_rows, config.embedding_std, rngs=rngs)
        if learned_positions:
            self.wpe = embedding(config, config.context_length, 0.02, rngs=rngs)
        self.layers = stack(block, config.layers, rngs)
        self.ln_f = layernorm(config)
        if head != "tied":
            self.lm_head = linear(config, config.width, config.head_rows, use_bias=head == "bias", rngs=rngs)

    def embed(self, ids: Int[Array, "B S"], dtype: Any = jnp.float32) -> Float[Array, "B S D"]:
        """Word embeddings; ids must be below ``vocab_rows`` (JAX clamps what is not)."""
        # In two steps: the table is split by width, and its slices cannot become rows of whole vectors in one.
        return split_rows(split_rows(self.wte(ids, dtype), features="model"))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 logits of the final hidden states, also where these are of lower precision."""
        if self.lm_head is not None:
            return self.lm_head(hidden, jnp.float32)
        return product(hidden, self.wte.weight[...].astype(hidden.dtype), preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache with room for positions 0 to ``slots`` - 1 of ``batch`` rows."""
        config = self.config
        shape = (batch, config.heads, slots, config.width // config.heads)
        if isinstance(self.layers, Unstacked):
            return KVCache(*(tuple(jnp.zeros(shape, dtype) for _ in self.layers) for _ in KVCache._fields))
        return KVCache(*(jnp.zeros((config.layers, *shape), dtype) for _ in KVCache._fields))

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        *,
        positions: Int[Array, "B S"] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        cache_rows: Int[Array, " B"] | None = None,
        collect: tuple[str, ...] = (),
        reduction: LayerReduction | None = None,
        remat: Remat = "none",
    ) -> LMOutput:
        """Runs all layers.

        Args:
            embeddings: word embeddings and image prefixes in one sequence.
            positions: position of every embedding, per row (default 0, 1, ...). With a cache they are also the
                slots that the new keys and values are written to.
            mask: what each query sees (default: what is not after it in ``positions``); with a cache, keys are its
                slots.
            cache: keys and values of earlier positions. Slots after a query's position are never seen, so right
                padding may leave garbage there; later tokens overwrite it.
            cache_rows: rows of the cache that the batch stands for (default: all, in order), so that one request can
                be run inside the cache of many.
            collect: fields of ``BlockOutput`` to return for every layer, with a leading axis L.
            reduction: what to compute along the layers.
            remat: what the backward pass recomputes, see ``nn.stack``.

        Raises:
            ValueError: without a cache, more embeddings than a table of learned positions has rows.
        """
        batch, length, _ = embeddings.shape
        if positions is None:
            # Prompts may be padded past the context: what stands there is garbage that nobody sees.
            if self.wpe is not None and cache is None and length > self.config.context_length:
                raise ValueError(
                    f"{length} positions exceed the context of {self.config.context_length}, which is all that a "
                    "language model with learned positions knows; shorten the sequence"
                )
            mask = Mask("causal") if mask is None and cache is None else mask
            positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        if mask is None and cache is not None:
            mask = Mask("causal", queries=positions)
        elif mask is None:
            mask = Mask("full", extra=positions[:, None, :] <= positions[:, :, None])
        x = embeddings if self.wpe is None else embeddings + self.wpe(positions, embeddings.dtype)
        rotary = None if self.rotary is None else rotary_table(positions, *self.rotary)
        windows = None
        if self.windows is not None:
            windows = jnp.array([np.iinfo(np.int32).max if window is None else window for window in self.windows])
            mask = mask if cache is not None else dataclasses.replace(mask, positions=positions)
        weights = reduction is not None or "attentions" in collect

        def body(layer, carry, inputs):
            x, cache, state = carry
            index, window = inputs
            cached = None if cache is None else CachedLayer(cache, index, cache_rows, positions)
            visible = mask if window is None else mask.with_window(window)
            output = layer(split_rows(x), visible, rotary, cached, weights=weights)
            if reduction is not None:
                state = reduction.step(state, output)
            return (output.out, output.cache, state), {name: getattr(output, name) for name in collect}

        layers = range(self.config.layers) if isinstance(self.layers, Unstacked) else jnp.arange(self.config.layers)
        first = (x, cache, None if reduction is None else reduction.first)
        (out, cache, state), collected = scan(self.layers, body, first, (layers, windows), remat=remat)
        return LMOutput(x, self.ln_f(out), cache, collected, state)

    def unstack(self) -> None:
        """Gives every layer arrays of its own, see ``nn.stack``; the paths are then ``layers/0/...`` and so on."""
        self.layers = Unstacked(self.layers, self.config.layers)

    def remove_adapters(self) -> None:
        """Removes every adapter: what is left computes exactly what the language model computed before."""
        for layers in self.layers if isinstance(self.layers, Unstacked) else [self.layers]:
            layers.mlp_adapter = None
            layers.attn_adapter = None


def embedding(config: DecoderConfig, rows: int, std: float, *, rngs: nnx.Rngs) -> Embedding:
    """A table of the language model's width, filled with N(0, ``std``)."""
    options = {"param": LanguageParam, "weight_init": normal(std), "dtype": float_dtype(config.dtype), "rngs": rngs}
    return Embedding(rows, config.width, **options)


def linear(
    config: DecoderConfig, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs
) -> Linear:
    """A linear layer of the language model, filled with N(0, 0.02)."""
    return Linear(
        in_features,
        out_features,
        param=LanguageParam,
        use_bias=use_bias,
        weight_init=normal(0.02),
        dtype=config.dtype,
        rngs=rngs,
    )


def layernorm(config: DecoderConfig) -> LayerNorm:
    """A LayerNorm of the language model."""
    return LayerNorm(config.width, param=LanguageParam, eps=config.layernorm_eps, dtype=float_dtype(config.dtype))


def check_heads(config: DecoderConfig) -> None:
    """Raises ValueError for sizes that no model has, or heads that do not divide the width."""
    check_sizes(config, "layers", "width", "heads", "feed_forward", "vocab_rows", "head_rows", "context_length")
    check_dtype("language model: dtype", config.dtype, QUANTIZED)
    if config.layers > MAX_LAYERS:
        raise ValueError(f"language model: {config.layers} layers are more than {MAX_LAYERS}")
    if config.width % config.heads:
        raise ValueError(f"language model: {config.heads} heads do not divide the width {config.width}")
