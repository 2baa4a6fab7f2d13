"""Dataset interface of all kinds of data, and the settings shared by datasets of single samples."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.pipeline import Overlong
from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.data.format.code_folder import Codes
from magma_jax.data.tokenizers.text import TextTokenizer
from magma_jax.typing import UInt8

# Batch array with a value per sample -> name of its sum.
TRUNCATED = {"truncated": "truncated_samples"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Batching settings shared by datasets of single samples.

    Attributes:
        length: maximum number of tokens per sample; shorter samples are padded to it.
        buckets: shorter padded lengths, ascending, for batches of short samples; each length in use is compiled once.
        pack: maximum number of samples packed into a row of ``length`` tokens; 1 disables packing.
        overlong: for samples with more tokens: ``error``, or ``truncate``, which cuts and counts them.
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
        """Value of ``Dataset.counted``."""
        return TRUNCATED if self.overlong == "truncate" else {}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Open dataset.

    Attributes:
        tokenizer: tokenizer of its texts.
        batches: ``(batch_size, seed, rows)`` to endless batches with this process's ``rows``, see
            ``data.batches.pipeline``; an iterable whose iterator has ``get_state``, ``set_state`` and ``close``.
        images: all images, uint8 (N, size, size, 3), in memory or decoded on access; None for text-only data.
        codes: codes of all images, for data without the images themselves; its batches hold ``codes`` (B, L).
        learned: rows of the training images; default: all.
        evaluation: samples by split, in a fixed order, in memory or read on access; empty for text-only data.
        records: metadata of every image, in the order of ``images``.
        validation_batches: ``(split, limit, batch_size, rows)`` to batches of up to ``limit`` samples of a split, the
            same on every call, with this process's ``rows``; None without validation data.
        counted: names of batch arrays (B,) to sum up -> names of their sums.
    """

    tokenizer: TextTokenizer
    batches: Callable[[int, int, Sequence[int]], Any]
    images: UInt8[np.ndarray, "N H W 3"] | StoredImages | None = None
    codes: Codes | None = None
    learned: Sequence[int] | None = None
    evaluation: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    records: Sequence[Any] = ()
    validation_batches: Callable[[str, int, int, Sequence[int]], list[Batch]] | None = None
    counted: Mapping[str, str] = dataclasses.field(default_factory=dict)
