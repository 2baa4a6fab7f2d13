"""Search for the documents with the largest inner products.

``ExactIndex`` shards the vectors over devices by rows. Every device scores its rows in chunks and keeps the best of
them; the best of all devices are merged at the end. A bank that exceeds the devices' room is searched in parts.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magma_jax.typing import Array, Float, Int

Method = Literal["exact", "approx", "faiss"]

# Rows whose scores are in memory at a time, on each device.
CHUNK = 16_384
# Rows of a chunk that share a maximum, by which the rows to compare are chosen.
GROUP = 128


class Found(NamedTuple):
    """The best documents of every query, best first; rows are -1 where there are fewer than k.

    Attributes:
        scores: fp32 (Q, k).
        rows: int64 (Q, k).
    """

    scores: np.ndarray
    rows: np.ndarray


class Index(Protocol):
    """A searchable bank."""

    def search(self, queries: Float[np.ndarray, "Q D"], k: int) -> Found:
        """The ``k`` best documents of every query."""
        ...


class ExactIndex:
    """Exact search, or ``lax.approx_max_k`` within chunks.

    Args:
        vectors: (N, D), in memory or memory-mapped.
        devices: default: all.
        method: exact, or approx.
        recall: recall that approx aims at.
        part: rows in the memory of each device at a time.
        dtype: dtype of the vectors there.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        *,
        devices: Sequence[Any] | None = None,
        method: Literal["exact", "approx"] = "exact",
        recall: float = 0.95,
        part: int = 2**22,
        dtype: str = "float32",
    ):
        if vectors.ndim != 2:
            raise ValueError(f"vectors are (N, D), got {list(vectors.shape)}")
        if method not in ("exact", "approx"):
            raise ValueError(f"method {method!r} is none of exact, approx")
        if not 0 < recall < 1:
            raise ValueError(f"recall must be above 0 and below 1, got {recall}")
        devices = jax.devices() if devices is None else list(devices)
        self._vectors, self._method, self._recall, self._dtype = vectors, method, recall, dtype
        self._mesh = Mesh(np.array(devices), ("rows",))
        each = min(part, -(-max(len(vectors), 1) // len(devices)))
        # Whole chunks, or a small bank as one.
        self._chunk = min(CHUNK, -(-each // GROUP) * GROUP)
        self._each = -(-each // self._chunk) * self._chunk
        self._kept: Array | None = None

    def search(self, queries: Float[np.ndarray, "Q D"], k: int) -> Found:
        """The ``k`` best documents of every query.

        Raises:
            ValueError: queries of another width, or ``k`` below 1.
        """
        width = self._vectors.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"the vectors have {width} entries, the queries are {list(queries.shape)}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        step = self._each * self._mesh.size
        asked = jax.device_put(np.asarray(queries, np.float32), NamedSharding(self._mesh, P()))
        scores = np.zeros((len(queries), 0), np.float32)
        rows = np.zeros((len(queries), 0), np.int64)
        for start in range(0, max(len(self._vectors), 1), step):
            part = self._part(start, step)
            count = jnp.int32(min(len(self._vectors) - start, step))
            best, places = _search_part(
                part, asked, count, mesh=self._mesh, chunk=self._chunk, k=k, method=self._method, recall=self._recall
            )
            scores = np.concatenate([scores, np.asarray(best)], axis=1)
            rows = np.concatenate([rows, start + np.asarray(places).astype(np.int64)], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        return Found(scores, np.where(np.isfinite(scores), rows, -1))

    def _part(self, start: int, step: int) -> Array:
        """Rows from ``start`` on, on the devices; the last ones may be padding. A bank of one part stays there."""
        if self._kept is not None:
            return self._kept
        sharding = NamedSharding(self._mesh, P("rows"))

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # the devices are those of this process
            first, stop, _ = index[0].indices(step)
            found = np.asarray(self._vectors[start + first : start + stop], self._dtype)
            missing = stop - first - len(found)
            return np.pad(found, ((0, missing), (0, 0))) if missing else found

        array = jax.make_array_from_callback((step, self._vectors.shape[1]), sharding, rows)
        if len(self._vectors) <= step:
            self._kept = array
        return array


class FaissIndex:
    """FAISS's flat index, for comparison and for banks that live there.

    Raises:
        ValueError: the package is missing.
    """

    def __init__(self, vectors: np.ndarray):
        try:
            import faiss  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("method faiss needs the package faiss-cpu: pip install 'magma_jax[faiss]'") from None
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        for start in range(0, len(vectors), 2**18):
            self._index.add(np.ascontiguousarray(vectors[start : start + 2**18], np.float32))

    def search(self, queries: Float[np.ndarray, "Q D"], k: int) -> Found:
        """The ``k`` best documents of every query."""
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return Found(scores, rows)


def make_index(vectors: np.ndarray, method: Method = "exact") -> Index:
    """An index of a method; errors as for the classes."""
    return FaissIndex(vectors) if method == "faiss" else ExactIndex(vectors, method=method)


def recall_at(found: Int[np.ndarray, "Q k"], exact: Int[np.ndarray, "Q k"]) -> float:
    """Share of the exact best rows that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


@functools.partial(jax.jit, static_argnames=("mesh", "chunk", "k", "method", "recall"))
def _search_part(
    vectors: Array, queries: Array, count: Array, *, mesh: Mesh, chunk: int, k: int, method: str, recall: float
) -> tuple[Array, Array]:
    """The best ``k`` of the first ``count`` rows, for every query: scores and rows."""

    def local(vectors: Array, queries: Array, count: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index("rows") * vectors.shape[0]
        number = queries.shape[0]

        def step(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            part = jax.lax.dynamic_slice_in_dim(vectors, start, chunk).astype(jnp.float32)
            scores = jax.lax.dot_general(queries, part, (((1,), (1,)), ((), ())), precision="highest")
            rows = first + start + jnp.arange(chunk)
            scores = jnp.where(rows < count, scores, -jnp.inf)
            best, places = _top(scores, min(k, chunk), method, recall)
            merged = jnp.concatenate([carry[0], best], axis=1)
            numbers = jnp.concatenate([carry[1], rows[places]], axis=1)
            kept, order = jax.lax.top_k(merged, k)
            return (kept, jnp.take_along_axis(numbers, order, axis=1)), None

        empty = jnp.full((number, k), -jnp.inf), jnp.full((number, k), -1, jnp.int32)
        empty = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "rows", to="varying"), empty)
        found, _ = jax.lax.scan(step, empty, jnp.arange(0, vectors.shape[0], chunk))
        return found

    scores, rows = jax.shard_map(
        local, mesh=mesh, in_specs=(P("rows"), P(), P()), out_specs=(P(None, "rows"), P(None, "rows"))
    )(vectors, queries, count)
    best, order = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(rows, order, axis=1)


def _top(scores: Array, k: int, method: str, recall: float) -> tuple[Array, Array]:
    """The best ``k`` of a chunk.

    Exact: the best are in the ``k`` groups with the largest maxima, so that only these are sorted.
    """
    if method == "approx":
        return jax.lax.approx_max_k(scores, k, recall_target=recall)
    groups = scores.reshape(scores.shape[0], -1, GROUP)
    if k >= groups.shape[1]:
        return jax.lax.top_k(scores, k)
    chosen = jax.lax.top_k(groups.max(axis=-1), k)[1]
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=1).reshape(scores.shape[0], -1)
    best, places = jax.lax.top_k(candidates, k)
    group = jnp.take_along_axis(chosen, places // GROUP, axis=1)
    return best, group * GROUP + places % GROUP
