"""Keys and values of earlier positions, which decoding token by token reads again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from magma_jax.typing import Array, Float, Int


class KVCache(NamedTuple):
    """Keys (after rotary) and values of every layer, T slots in each row, slot = position.

    Arrays (L, B, G, T, K); where the layers are apart, a tuple of L arrays (B, G, T, K).
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
        """With ``new``, (B, S, G, K) each, written to a layer."""

        def written(kept: Any, new: Any) -> Any:
            if isinstance(kept, tuple):
                changed = kept[layer].at[rows[:, None], :, positions].set(new.astype(self.dtype))
                return (*kept[:layer], changed, *kept[layer + 1 :])
            arguments = (kept, layer, rows, positions, new.astype(self.dtype))
            if new.shape[1] > 1:
                return write_scattered(*arguments)
            # TPUs would copy the whole cache in every layer for a scatter.
            return jax.lax.platform_dependent(*arguments, tpu=write_row_by_row, default=write_scattered)

        return KVCache(written(self.key, new.key), written(self.value, new.value))

    def read(self, layer: Any, rows: Int[Array, " B"] | None) -> tuple[Array, Array]:
        """Keys and values (B, G, T, K) of a layer; None for all rows."""
        if rows is None:
            return self.key[layer], self.value[layer]
        if isinstance(self.key, tuple):
            return self.key[layer][rows], self.value[layer][rows]
        assert not isinstance(self.value, tuple)  # as its keys
        return self.key[layer, rows], self.value[layer, rows]


def write_scattered(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    """``new`` (B, S, G, K) at positions (B, S) of rows (B,) of a layer; those behind the last slot write nothing."""
    return kept.at[layer, rows[:, None], :, positions].set(new)


def write_row_by_row(kept: Array, layer: Any, rows: Array, positions: Array, new: Array) -> Array:
    """``write_scattered`` for one position in every row (S = 1).

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

    def extend(self, key: Float[Array, "B S G K"], value: Float[Array, "B S G K"]) -> tuple[KVCache, Array, Array]:
        """The cache with new keys and values, and all of the layer's, (B, G, T, K) each."""
        rows = jnp.arange(key.shape[0]) if self.rows is None else self.rows
        cache = self.cache.write(self.layer, rows, self.positions, KVCache(key, value))
        return cache, *cache.read(self.layer, self.rows)
