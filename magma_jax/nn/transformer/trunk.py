"""The layers of a transformer, from embeddings to hidden states; embedding and head belong to the model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.nn.layers import Embedding, normal
from magma_jax.nn.lora import LoraLinear
from magma_jax.nn.masks import Mask
from magma_jax.nn.quantized import float_dtype
from magma_jax.nn.stack import Remat, scan, stack, unstack
from magma_jax.nn.transformer.block import Block, BlockOutput, norm
from magma_jax.nn.transformer.cache import CachedLayer, KVCache
from magma_jax.nn.transformer.config import TrunkConfig
from magma_jax.runtime.sharding import split_rows
from magma_jax.typing import Array, Float, Int, PRNGKey


class LayerReduction(NamedTuple):
    """A reduction over layers, for values that would take too much memory if every layer returned them.

    ``step(state, block_output)`` returns the next state; ``first`` is the state before the first layer.
    """

    step: Callable[[Any, BlockOutput], Any]
    first: Any


class TrunkOutput(NamedTuple):
    """Result of ``Trunk``.

    ``collected`` holds the requested fields, stacked over layers; ``reduced`` the last state of a ``LayerReduction``.
    """

    inputs: Array  # (B, S, D) input of the first block: the embeddings, plus learned positions if any
    hidden: Array  # (B, S, D) after the final norm
    cache: KVCache | None
    collected: dict[str, Array]
    reduced: Any


class _Sequence(NamedTuple):
    """Values shared by all layers."""

    positions: Array  # (B, S)
    mask: Mask
    rotary: tuple[Array, Array] | None  # sines and cosines (B, S, R); (N, B, S, R) if layers choose among N tables
    cache_rows: Array | None


class _Carry(NamedTuple):
    """Loop carry from layer to layer."""

    x: Array  # (B, S, D)
    cache: KVCache | None
    reduced: Any


class _Layer(NamedTuple):
    """Per-layer values other than weights, stacked over layers."""

    number: Any
    window: Array | None
    rotary: Array | None  # row of the rotary tables
    dropout_key: Array | None


class Trunk(nnx.Module):
    """Stacked ``layers``; learned positions ``wpe`` before them and a norm ``ln_f`` after them are optional."""

    wpe: Embedding | None = None
    ln_f: nnx.Module | None = None

    def __init__(self, config: TrunkConfig, *, rngs: nnx.Rngs):
        self.trunk = config
        block, positions = config.block, config.positions
        if positions is not None:
            self.wpe = Embedding(
                positions.length + positions.offset,
                block.width,
                param=block.param,
                weight_init=normal(positions.std),
                dtype=float_dtype(block.dtype),
                rngs=rngs,
            )
        self.layers = stack(lambda rngs: Block(block, rngs=rngs), config.layers, rngs)
        if config.final_norm:
            self.ln_f = norm(block)

    def init_cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
        """An empty cache with room for positions 0 to ``slots`` - 1 of ``batch`` rows."""
        block = self.trunk.block
        shape = (batch, block.key_heads, slots, block.size)
        if isinstance(self.layers, nnx.List):
            return KVCache(*(tuple(jnp.zeros(shape, dtype) for _ in self.layers) for _ in KVCache._fields))
        return KVCache(*(jnp.zeros((self.trunk.layers, *shape), dtype) for _ in KVCache._fields))

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
        dropout_key: PRNGKey | None = None,
        remat: Remat = "none",
    ) -> TrunkOutput:
        """Runs all layers.

        Args:
            embeddings: word embeddings and image prefixes in one sequence.
            positions: position of every embedding, per row (default 0, 1, ...). With a cache they are also the
                slots that the new keys and values are written to.
            mask: which keys each query sees (default: causal in ``positions``); with a cache, keys are its slots.
            cache: keys and values of earlier positions. Slots after a query's position are never seen, so right
                padding may leave garbage there; later tokens overwrite it.
            cache_rows: cache rows of the batch (default: all, in order), so that one request can run inside a shared
                cache.
            collect: fields of ``BlockOutput`` to return for every layer, with a leading axis L.
            reduction: reduction over the layers.
            dropout_key: None for no dropout.
            remat: remat policy of the backward pass, see ``nn.stack``.

        Raises:
            ValueError: without a cache, more embeddings than a table of learned positions has rows.
        """
        cached, in_order = cache is not None, positions is None
        if positions is None:
            positions = self._count_positions(embeddings, cached)
        if mask is None:
            mask = _causal_mask(positions, cached=cached, in_order=in_order)
        inputs = embeddings if self.wpe is None else embeddings + self._position_vectors(positions, embeddings.dtype)
        last, collected = self._run_layers(
            _Carry(inputs, cache, None if reduction is None else reduction.first),
            self._sequence(positions, mask, cache_rows, cached),
            collect=collect,
            reduce=None if reduction is None else reduction.step,
            dropout_key=dropout_key,
            remat=remat,
        )
        hidden = last.x if self.ln_f is None else self.ln_f(last.x)
        return TrunkOutput(inputs, hidden, last.cache, collected, last.reduced)

    def _count_positions(self, embeddings: Float[Array, "B S D"], cached: bool) -> Int[Array, "B S"]:
        """0, 1, ... in every row."""
        batch, length, _ = embeddings.shape
        table = self.trunk.positions
        # With a cache, prompts may be padded past the context: the padding is never seen.
        if table is not None and not cached and length > table.length:
            raise ValueError(
                f"{length} positions exceed the context of {table.length}, which is all that a language model with "
                "learned positions knows; shorten the sequence"
            )
        return jnp.broadcast_to(jnp.arange(length), (batch, length))

    def _position_vectors(self, positions: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
        assert self.trunk.positions is not None  # it has a table of positions
        assert self.wpe is not None
        offset = self.trunk.positions.offset
        return self.wpe(positions + offset if offset else positions, dtype)

    def _sequence(self, positions: Array, mask: Mask, cache_rows: Array | None, cached: bool) -> _Sequence:
        rotary = self.trunk.block.rotary
        if self.trunk.windows is not None and not cached:
            mask = dataclasses.replace(mask, positions=positions)
        if rotary is None:
            tables = None
        elif self.trunk.rotary is None:
            tables = rotary.table(positions)
        else:
            # An angle of zero leaves a layer without rotary embedding as it is, bit for bit.
            found = [
                rotary.table(jnp.zeros_like(positions)) if own is None else own.table(positions)
                for own in dict.fromkeys(self.trunk.rotary)
            ]
            tables = jnp.stack([sin for sin, _ in found]), jnp.stack([cos for _, cos in found])
        return _Sequence(positions, mask, tables, cache_rows)

    def _run_layers(
        self,
        first: _Carry,
        sequence: _Sequence,
        *,
        collect: tuple[str, ...],
        reduce: Callable[[Any, BlockOutput], Any] | None,
        dropout_key: PRNGKey | None,
        remat: Remat,
    ) -> tuple[_Carry, dict[str, Array]]:
        count, windows = self.trunk.layers, self.trunk.windows
        if windows is not None:
            windows = jnp.array([np.iinfo(np.int32).max if window is None else window for window in windows])
        own = _Layer(
            number=range(count) if isinstance(self.layers, nnx.List) else jnp.arange(count),
            window=windows,
            rotary=None if self.trunk.rotary is None else _rows(self.trunk.rotary),
            dropout_key=None if dropout_key is None else jax.random.split(dropout_key, count),
        )
        step = functools.partial(_run_layer, sequence=sequence, collect=collect, reduce=reduce)
        return scan(self.layers, step, first, own, remat=remat)

    def unstack(self) -> None:
        """Gives every layer separate arrays, see ``nn.stack``; the paths become ``layers/0/...`` and so on."""
        self.layers = unstack(self.layers, self.trunk.layers)

    def remove_adapters(self) -> None:
        """Removes every adapter; the trunk then computes exactly what it computed without them."""
        for layers in self.layers if isinstance(self.layers, nnx.List) else [self.layers]:
            layers.mlp_adapter = None
            layers.attn_adapter = None
            for module in (*vars(layers.attn).values(), *vars(layers.mlp).values()):
                if isinstance(module, LoraLinear):
                    module.remove()


def _rows(values: tuple[Any, ...]) -> Int[Array, " L"]:
    """Index of each value among the distinct ones, in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return jnp.array([distinct.index(value) for value in values])


def _run_layer(
    layer: Block,
    carry: _Carry,
    own: _Layer,
    *,
    sequence: _Sequence,
    collect: tuple[str, ...],
    reduce: Callable[[Any, BlockOutput], Any] | None,
) -> tuple[_Carry, dict[str, Array]]:
    cached = None
    if carry.cache is not None:
        cached = CachedLayer(carry.cache, own.number, sequence.cache_rows, sequence.positions)
    output = layer(
        split_rows(carry.x),
        sequence.mask if own.window is None else sequence.mask.with_window(own.window),
        sequence.rotary if own.rotary is None else jax.tree.map(lambda table: table[own.rotary], sequence.rotary),
        cached,
        weights=reduce is not None or "attentions" in collect,
        dropout_key=own.dropout_key,
    )
    reduced = carry.reduced if reduce is None else reduce(carry.reduced, output)
    return _Carry(output.out, output.cache, reduced), {name: getattr(output, name) for name in collect}


def _causal_mask(positions: Int[Array, "B S"], *, cached: bool, in_order: bool) -> Mask:
    """Causal mask in ``positions``; it is a rule that kernels know if these are indices into the sequence."""
    if cached:
        return Mask("causal", queries=positions)
    if in_order:
        return Mask("causal")
    return Mask("full", extra=positions[:, None, :] <= positions[:, :, None])
