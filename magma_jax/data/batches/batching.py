"""From single samples to batches of few shapes: padded to a bucket, or packed several to a row.

A sample is a dict of ``tokens`` and ``labels`` of its own length and of scalars such as ``images``, the row of its
image. Every shape of a batch is a program to compile, so the lengths are declared.

A padded batch has (B, S) tokens and labels and (B,) scalars. In a packed batch a row holds up to K samples: (B, S)
tokens and labels, (B, K) scalars, and for every token ``segments``, the number of its sample in the row (1, 2, ...; 0
is padding), and ``positions``, its place in that sample (0, 1, ...).

Batches depend on the order of the samples alone: every process forms the same ones and takes its own rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset, ThreadPrefetchIterDataset

# Batches that are formed together, out of samples sorted by their bucket. Of samples of 8 to 40 tokens, in buckets of
# 16, 24, 32 and 40 and 64 a batch, padding is 40 % unsorted, 19 % with 4 batches, 15 % with 16, 14 % with 64.
WINDOW = 16

Sample = dict[str, Any]
Batch = dict[str, np.ndarray]


class PaddedBatches(grain.MapDataset):
    """Batches of ``batch_size`` samples, each as long as the smallest of ``buckets`` that holds all its samples.

    With one bucket, row r of batch b is sample b * batch_size + r. With several, samples of similar length must meet:
    the samples of ``WINDOW`` batches are sorted by bucket, cut into batches, and these come in a random order. Every
    sample comes exactly once either way, and the number of batches read is all there is to know about the position.

    Args:
        parent: samples, none longer than the last bucket.
        rows: those of every batch that are wanted, in this order.
        padding: what fills up the arrays of a sample, by name.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        *,
        batch_size: int,
        rows: Sequence[int],
        buckets: Sequence[int],
        padding: Mapping[str, int],
        seed: int,
    ):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, tuple(rows)
        self._buckets, self._padding, self._seed = tuple(buckets), dict(padding), seed
        self._window: tuple[int, list[Sample], np.ndarray] | None = None

    def __len__(self) -> int:
        group = self._batch_size * (1 if len(self._buckets) == 1 else WINDOW)
        return len(self._parent) // group * (group // self._batch_size)

    @overload
    def __getitem__(self, index: slice) -> grain.MapDataset: ...
    @overload
    def __getitem__(self, index: int) -> Batch: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        index %= len(self)
        if len(self._buckets) == 1:
            length = self._buckets[0]
            members = [self._parent[index * self._batch_size + row] for row in self._rows]
        else:
            number, place = divmod(index, WINDOW)
            samples, order = self._sorted(number)
            batch = [samples[i] for i in order[place]]
            length = next(b for b in self._buckets if b >= max(len(sample["tokens"]) for sample in batch))
            members = [batch[row] for row in self._rows]
        return {name: self._stack(name, [sample[name] for sample in members], length) for name in members[0]}

    def _sorted(self, number: int) -> tuple[list[Sample], np.ndarray]:
        """The samples of a window, and (WINDOW, batch_size) which of them make up each batch."""
        window = self._window
        if window is None or window[0] != number:
            size = WINDOW * self._batch_size
            samples: list[Any] = [self._parent[i] for i in range(number * size, (number + 1) * size)]
            # By bucket and not by length: within one the order stays random.
            buckets = np.searchsorted(self._buckets, [len(sample["tokens"]) for sample in samples])
            order = np.argsort(buckets, kind="stable").reshape(WINDOW, self._batch_size)
            order = np.random.default_rng((self._seed, number)).permutation(order)
            self._window = window = number, samples, order
        return window[1], window[2]

    def _stack(self, name: str, values: list[Any], length: int) -> np.ndarray:
        if np.ndim(values[0]) == 0:
            return np.stack(values)
        filler = _padding_value(self._padding, name)
        return np.stack([np.pad(v, (0, length - len(v)), constant_values=filler) for v in values])


def _padding_value(padding: Mapping[str, int], name: str) -> int:
    if name not in padding:
        raise ValueError(f"samples hold {name!r}, but the dataset does not say what it is padded with")
    return padding[name]


def padded_batches(samples: grain.MapDataset, **options: Any) -> grain.IterDataset:
    """``PaddedBatches``, formed ahead of time by a thread of their own."""
    # One thread: batches of one window share its samples.
    return PaddedBatches(samples, **options).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))


def packed_batches(
    samples: grain.MapDataset,
    *,
    batch_size: int,
    rows: Sequence[int],
    length: int,
    pack: int,
    padding: Mapping[str, int],
) -> grain.IterDataset:
    """Batches of ``rows`` of ``batch_size`` rows; a sample goes to the first row with ``length`` tokens and ``pack``
    samples not exceeded, and a batch ends with the first sample that fits nowhere.
    """
    first: Any = samples[0]
    whole = {name for name, value in first.items() if np.ndim(value)}
    packed = FirstFitPackIterDataset(
        samples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8 * batch_size)),
        length_struct={name: length if name in whole else pack for name in first},
        padding_struct={name: _padding_value(padding, name) if name in whole else 0 for name in first},
        num_packing_bins=batch_size,
        max_sequences_per_bin=pack,
        shuffle_bins=False,
    )

    def take(batch: Batch) -> Batch:
        kept = {name: batch[name] for name in first}
        kept |= {"segments": batch["tokens_segment_ids"], "positions": batch["tokens_positions"]}
        return {name: array[list(rows)] for name, array in kept.items()}

    return ThreadPrefetchIterDataset(packed.batch(batch_size, drop_remainder=True).map(take), prefetch_buffer_size=8)
