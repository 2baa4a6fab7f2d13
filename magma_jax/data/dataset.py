"""What a run is given to learn from, whatever kind of data it is; and the settings that kinds made of samples share."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.folders import FolderBatches
from magma_jax.data.batches.pipeline import Overlong
from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.data.tokenizers.byte_level import Tokenizer
from magma_jax.typing import UInt8

# What is counted of samples, by the name of the array of a batch that tells it for each.
TRUNCATED = {"truncated": "truncated_samples"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """How samples become batches; the part that data of single samples have in common.

    Attributes:
        length: tokens of a sample at most; shorter ones are padded to it.
        buckets: shorter lengths, ascending, that batches of shorter samples are padded to instead; every length in use
            is compiled once.
        pack: how many samples of ``length`` tokens in all may share a row, in place of padding; 1 for one a row.
        overlong: samples of more tokens are an ``error``, or ``truncate`` cuts and counts them.
    """

    length: int = 32
    buckets: tuple[int, ...] = ()
    pack: int = 1
    overlong: Overlong = "error"

    def __post_init__(self):
        lengths = (0, *self.buckets, self.length)
        if any(shorter >= longer for shorter, longer in itertools.pairwise(lengths)):
            raise ValueError(f"data.buckets {self.buckets} must ascend and stay below data.length {self.length}")
        if self.pack < 1:
            raise ValueError(f"data.pack must be at least 1, got {self.pack}")
        if self.pack > 1 and self.buckets:
            raise ValueError("data.pack fills rows of data.length: set data.buckets to (), or data.pack to 1")

    @property
    def counted(self) -> dict[str, str]:
        """``Dataset.counted`` of such data."""
        return TRUNCATED if self.overlong == "truncate" else {}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset ready to be drawn from.

    Attributes:
        tokenizer: of its texts.
        batches: ``(batch_size, seed, rows)`` to endless batches, of which this process wants ``rows``; see
            ``data.batches.pipeline``.
        images: every image, uint8 (N, size, size, 3), in memory or decoded when asked for; None for text alone.
        learned: rows of the images that may be learned from; all by default.
        evaluation: split to samples, in a fixed order, in memory or read when asked for; empty for text alone.
        records: what is known of every image, in the order of ``images``.
        validation_batches: ``(split, limit, batch_size, rows)`` to the batches of up to ``limit`` samples of a split,
            always the same ones, of which this process wants ``rows``; None where there is nothing to validate on.
        counted: names of arrays (B,) that batches hold to be summed up, and what their sums are called.
    """

    tokenizer: Tokenizer
    batches: Callable[[int, int, Sequence[int]], grain.IterDataset | FolderBatches]
    images: UInt8[np.ndarray, "N H W 3"] | StoredImages | None = None
    learned: Sequence[int] | None = None
    evaluation: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    records: Sequence[Any] = ()
    validation_batches: Callable[[str, int, int, Sequence[int]], list[Batch]] | None = None
    counted: Mapping[str, str] = dataclasses.field(default_factory=dict)
