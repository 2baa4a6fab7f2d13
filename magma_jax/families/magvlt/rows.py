"""Rows of compiled programs: candidates of results, their keys, and runs in parts."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from magma_jax.inference.buckets import Buckets
from magma_jax.inference.decoding.config import SEED_BITS
from magma_jax.inference.decoding.masked import Trace
from magma_jax.inference.decoding.sampling import seed_key
from magma_jax.typing import Array

# Rows of a compiled program; more are run in parts.
ROWS = Buckets((1, 2, 4, 8, 16, 32))


def best(scores: np.ndarray, candidates: int) -> np.ndarray:
    """The row of the best candidate of each result."""
    groups = scores.reshape(-1, candidates)
    return np.arange(len(groups)) * candidates + np.argmax(groups, 1)


def repeated(array: np.ndarray, count: int) -> np.ndarray:
    """The first row, so many times."""
    return np.repeat(array[:1], count, 0)


def keys_of(seed: int, start: int, count: int) -> Array:
    """Keys of the seeds from ``seed`` + ``start`` on."""
    return jnp.stack([seed_key((seed + i) % 2**SEED_BITS) for i in range(start, start + count)])


def in_parts(
    function: Callable[[slice, Array], tuple[Any, ...]], seed: int, count: int
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Runs ``function(rows, keys)`` for so many rows, in parts of the sizes of ``ROWS``; further rows are dropped."""
    size = min(ROWS.fit(count), ROWS.sizes[-1])
    parts = []
    for start in range(0, count, size):
        parts.append(function(slice(start, min(start + size, count)), keys_of(seed, start, size)))
    first, second = (np.concatenate([np.asarray(part[i]) for part in parts])[:count] for i in range(2))
    traces = [part[2] for part in parts]
    if traces[0] is None:
        return first, second, None
    fields = zip(*traces, strict=True)
    joined = (np.concatenate([np.asarray(array) for array in arrays], 1)[:, :count] for arrays in fields)
    return first, second, Trace(*joined)
