"""Validation batches: the same held-out samples in the same order every time."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.batching import Batch, PaddedBatches
from magma_jax.data.batches.sources import UnusableSample
from magma_jax.runtime.distributed import log_main
from magma_jax.typing import IGNORED


def held_out_batches(
    evaluation: Mapping[str, Sequence[Any]],
    encode: Callable[[Any], dict[str, Any]],
    length: int,
    padding: Mapping[str, int],
) -> Callable[[str, int, int, Sequence[int]], list[Batch]]:
    """Creates the ``Dataset.validation_batches`` of samples in splits.

    Args:
        evaluation: samples by split.
        encode: sample to ``tokens``, ``labels`` and others, such as ``data.batches.pipeline.encode_sample``.
        length: padded length of every batch.
        padding: see ``PaddedBatches``.
    """

    def batches(split: str, limit: int, batch_size: int, rows: Sequence[int]) -> list[Batch]:
        encoded = [encode(sample) for sample in spaced_samples(evaluation, split, limit)]
        # The last batch is filled with rows without labels.
        filler = {**encoded[0], "labels": np.full_like(encoded[0]["labels"], IGNORED)}
        encoded += [filler] * (-len(encoded) % batch_size)
        padded = PaddedBatches(
            grain.MapDataset.source(encoded),
            batch_size=batch_size,
            rows=rows,
            buckets=(length,),
            padding=padding,
            seed=0,
        )
        return [padded[i] for i in range(len(padded))]

    return batches


def spaced_samples(evaluation: Mapping[str, Sequence[Any]], split: str, limit: int) -> list[Any]:
    """Up to ``limit`` samples of a split, evenly spaced in its order; the same ones every time.

    Unusable samples are skipped with a printed line, so that validation does not end a run.

    Raises:
        ConfigError: the dataset has no such split, or none of its samples can be used.
    """
    samples = evaluation.get(split, ())
    if not samples:
        known = ", ".join(name for name, members in evaluation.items() if members)
        raise ConfigError(f"validation.split {split!r}: the dataset has {known or 'no samples to validate on'}")
    rows = np.unique(np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int))
    chosen, unusable = [], collections.Counter()
    for row in rows.tolist():
        try:
            chosen.append(samples[row])
        except UnusableSample as error:
            unusable[str(error)] += 1
    if unusable:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in unusable.items())
        log_main(f"validation goes without {unusable.total()} of {len(rows)} samples ({reasons})")
    if not chosen:
        raise ConfigError(f"validation.split {split!r}: none of its samples can be used")
    return chosen
