"""Attention masks as rules instead of arrays, so that a kernel can be told "causal".

In a sequence of two prefix positions p and two words w, a query (row) sees these keys (columns):

    causal     prefix     full       window 2   segments 1 1 2 2
    p p w w    p p w w    p p w w    p p w w    p p w w
    1 0 0 0    1 1 0 0    1 1 1 1    1 0 0 0    1 0 0 0
    1 1 0 0    1 1 0 0    1 1 1 1    1 1 0 0    1 1 0 0
    1 1 1 0    1 1 1 0    1 1 1 1    0 1 1 0    0 0 1 0
    1 1 1 1    1 1 1 1    1 1 1 1    0 0 1 1    0 0 1 1
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from magma_jax.typing import Array, Bool, Int

# Finite, so that a row without any visible key gives finite (unused) numbers instead of NaN.
MASKED_SCORE = -1e30

# causal: keys at or before the query. prefix: causal, plus a prefix of the row. full: all keys.
Kind = Literal["causal", "prefix", "full"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those that every rule allows. Positions are indices into the sequence, from 0.

    Attributes:
        kind: see ``Kind``.
        prefix: (B,) prefix length of each row, for ``kind`` prefix.
        lengths: (B,) row lengths; keys past them are padding and are never seen.
        segments: (B, S) segment ids of packed samples; a query sees only its own segment.
        window: number of positions that a query sees, itself included; an array if it differs between layers.
        positions: (B, S) positions that the window is measured in, if they differ from the indices.
        extra: (B or 1, S or 1, T) additional mask.
        queries: (B, S) indices of the queries among the keys, as with a cache; None for 0, 1, ...
    """

    kind: Kind = dataclasses.field(default="causal", metadata={"static": True})
    prefix: Any = None
    lengths: Any = None
    segments: Any = None
    window: Any = None
    positions: Any = None
    extra: Any = None
    queries: Any = None

    def __post_init__(self):
        if self.kind == "prefix" and self.prefix is None:
            raise ValueError("a mask of kind prefix needs the lengths of the prefixes")

    def visible(self, queries: Int[Array, " s"], keys: Int[Array, " t"]) -> Bool[Array, "#B s t"]:
        """True where a query sees a key; ``queries`` and ``keys`` are indices into the sequence."""
        places = queries[None] if self.queries is None else self.queries[:, queries]
        q, k = places[:, :, None], keys[None, None, :]
        seen = jnp.ones((1, len(queries), len(keys)), bool) if self.kind == "full" else k <= q
        if self.kind == "prefix":
            seen = seen | (k < self.prefix[:, None, None])
        if self.window is not None and self.positions is None:
            seen = seen & (q - k < self.window)
        elif self.window is not None:
            distance = self.positions[:, queries][:, :, None] - self.positions[:, keys][:, None, :]
            seen = seen & (distance < self.window)
        if self.lengths is not None:
            seen = seen & (k < self.lengths[:, None, None])
        if self.segments is not None:
            seen = seen & (self.segments[:, queries][:, :, None] == self.segments[:, keys][:, None, :])
        if self.extra is not None:
            rows = self.extra if self.extra.shape[1] == 1 else self.extra[:, queries]
            seen = seen & rows[:, :, keys]
        return seen

    @property
    def hides(self) -> bool:
        """Whether any key may be hidden from a query."""
        rules = (self.lengths, self.segments, self.window, self.extra)
        return self.kind != "full" or any(rule is not None for rule in rules)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#B S T"]:
        """The whole mask as an array."""
        return self.visible(jnp.arange(queries), jnp.arange(keys))

    def with_window(self, window: Any) -> "Mask":
        """The same mask with another window; None for no window."""
        return dataclasses.replace(self, window=window)
