"""KV cache: keys and values of earlier positions, for token-by-token decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from magma_jax.typing import Array, Float, Int


class KVCache(NamedTuple):
    """Keys (after rotary) and values of every layer, with T slots per row; slot = position.

    Arrays (L, B, G, T, K); for unstacked layers, a tuple of L arrays (B, G, T, K).
    """

    key: Array | tuple[Array, ...]
    value: Array | tuple[Array, ...]

    @property
    def slots(self) -> int:
        """Slots per row, T."""
        return self.key[0].shape[-2]

    @property
    def dtype(self) -> Any:
        """Dtype of keys and values."""
        return self.key[0].dtype

    def rows(self, rows: Int[Array, " R"]) -> "KVCache":
        """A cache of the given rows, in that order; a row may be repeated."""
        return jax.tree.map(lambda leaf: leaf[..., rows, :, :, :], self)

    def write(self, layer: Any, rows: Int[Array, " B"], positions: Int[Array, "B S"], new: "KVCache") -> "KVCache":
        """The cache with ``new`` keys and values, (B, S, G, K) each, written to a layer."""

        def written(kept: Any, new: Any) -> Any:
            if isinstance(kept, tuple):
                changed = kept[layer].at[rows[:, None], :, positions].set(new.astype(self.dtype))
                return (*kept[:layer], changed, *kept[layer + 1 :])
            arguments = (kept, layer, rows, positions, new.astype(self.dtype))
            if new.shape[1] > 1:
                return write_scattered(*arguments)
            # On TPUs a scatter would copy the whole cache in every layer.
            return jax.lax.platform_dependent(*arguments, tpu=write_row_by_row, default=write_scattered)

        return KVCache(written(self.key, new.key), written(self.value, new.value))

    def read(self, layer: Any, rows: Int[Array, " B"] | None) -> tuple[Array, Array]:
        """Keys and values (B, G, T, K) of a layer; ``rows=None`` for all rows."""
        if rows is None:
            return self.key[layer], self.value[layer]
        if isinstance(self.key, tuple):
            return self.key[layer][rows], self.value[layer][rows]
        assert not isinstance(self.value, tuple)  # as its keys
        return self.key[layer, rows], self.value[layer, rows]


def write_scattered(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    """Sets ``new`` (B, S, G, K) at positions (B, S) of rows (B,) of a layer; those past the last slot are dropped."""
    return kept.at[layer, rows[:, None], :, positions].set(new)


def write_row_by_row(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    """``write_scattered`` for one position per row (S = 1).

    The cache keeps its layout; otherwise the compiler would choose one for these writes and copy the cache both ways.
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
    """One layer's view of a cache, and the slots that its new keys and values are written to.

    Attributes:
        cache: cache of all layers. The loop over layers carries it and writes it in place: stacking per-layer caches
            would copy them at every step.
        layer: index of the layer.
        rows: (B,) cache rows of the batch; None for all, in order.
        positions: (B, S) slots of the new positions.
    """

    cache: KVCache
    layer: Any
    rows: Array | None
    positions: Array

    def extend(self, key: Float[Array, "B S G K"], value: Float[Array, "B S G K"]) -> tuple[KVCache, Array, Array]:
        """The cache with new keys and values, and all keys and all values of the layer, (B, G, T, K) each."""
        rows = jnp.arange(key.shape[0]) if self.rows is None else self.rows
        cache = self.cache.write(self.layer, rows, self.positions, KVCache(key, value))
        return cache, *cache.read(self.layer, self.rows)
