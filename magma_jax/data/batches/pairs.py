"""Batches of image-text pairs with everything random that a loss needs, from the batch's number alone.

Beside the arrays of its samples a batch has ``partner_...``, those of the next row's sample, with which a row may be
mixed; ``seeds`` (B,) uint32, one a row; and ``draws`` (B, 2), two numbers from [0, 1), equal in all rows. All of them
are the same whatever number of processes, devices or parts a batch is divided over.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import grain
import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.held_out import spaced_samples

# A sample to arrays of a fixed shape, given a source of random numbers; None for none.
Encode = Callable[[Any, random.Random | None], dict[str, Any]]

PARTNER = "partner_"


class PairBatches(grain.MapDataset):
    """Batches of ``batch_size`` encoded samples in the order of ``parent``, of which ``rows`` are returned."""

    def __init__(self, parent: grain.MapDataset, *, batch_size: int, rows: Sequence[int], seed: int):
        super().__init__(parent)
        self._batch_size, self._rows, self._seed = batch_size, tuple(rows), seed

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size

    @overload
    def __getitem__(self, index: slice) -> grain.MapDataset: ...
    @overload
    def __getitem__(self, index: int) -> Batch: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        index %= len(self)
        size, rows = self._batch_size, self._rows
        wanted = sorted({*rows, *((row + 1) % size for row in rows)})
        samples = {row: self._parent[index * size + row] for row in wanted}
        return stacked(samples, rows, size, np.random.default_rng((self._seed, index)))


def stacked(samples: Mapping[int, Batch], rows: Sequence[int], size: int, rng: np.random.Generator) -> Batch:
    """A batch of ``size`` from the encoded samples of ``rows`` and of their next rows."""
    batch = {
        prefix + name: np.stack([samples[(row + after) % size][name] for row in rows])
        for prefix, after in (("", 0), (PARTNER, 1))
        for name in next(iter(samples.values()))
    }
    draws, seeds = rng.random(2, dtype=np.float32), rng.integers(2**32, size=size, dtype=np.uint32)
    return batch | {"draws": np.tile(draws, (len(rows), 1)), "seeds": seeds[list(rows)]}


def pair_batches(
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    encode: Encode,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int],
) -> grain.IterDataset:
    """Endless batches that mix ``sources`` by ``weights``; every source is reshuffled each epoch."""

    def encoded(source: int, index: int, sample: Any) -> Batch:
        return encode(sample, random.Random(f"{seed}/{source}/{index}"))

    datasets = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat().map_with_index(functools.partial(encoded, i))
        for i, source in enumerate(sources)
    ]
    samples = grain.MapDataset.mix(datasets, list(weights))
    batches = PairBatches(samples, batch_size=batch_size, rows=rows, seed=seed)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))


def held_out_pairs(
    evaluation: Mapping[str, Sequence[Any]], encode: Encode
) -> Callable[[str, int, int, Sequence[int]], list[Batch]]:
    """Creates the ``Dataset.validation_batches`` of pairs in splits; the last batch repeats the first samples.

    The first of ``draws`` is spread evenly over the batches.
    """

    def batches(split: str, limit: int, batch_size: int, rows: Sequence[int]) -> list[Batch]:
        chosen = [encode(sample, None) for sample in spaced_samples(evaluation, split, limit)]
        count = -(-len(chosen) // batch_size)
        found = []
        for number in range(count):
            samples = {row: chosen[(number * batch_size + row) % len(chosen)] for row in range(batch_size)}
            batch = stacked(samples, rows, batch_size, np.random.default_rng(number))
            batch["draws"][:, 0] = (number + 0.5) / count
            found.append(batch)
        return found

    return batches
