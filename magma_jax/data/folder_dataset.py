"""Mixtures of dataset folders written by ``python -m magma_jax.data``."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import grain
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.folders import FolderBatches, drawn_samples
from magma_jax.data.batches.held_out import held_out_batches
from magma_jax.data.batches.pipeline import encode_sample, form_batches, text_padding
from magma_jax.data.batches.sources import FolderSamples, JoinedSamples, SourceConfig, sources_by_split
from magma_jax.data.batches.stored_images import Augment, Decode, ImageOptions, StoredImages
from magma_jax.data.dataset import Dataset, SamplesConfig
from magma_jax.data.tokenizers.load import load_tokenizer
from magma_jax.data.workers import cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldersConfig(SamplesConfig):
    """Config of dataset folders.

    Attributes:
        folders: split to the folders mixed in it, each a path or a ``SourceConfig``.
        tokenizer: ``gpt2``, a ``tokenizer.json`` or its folder, or a GGUF file; None for the tokenizer of the run's
            ``base``, or ``gpt2`` without one.
        classes: class names for classification; every answer must be one of them, and the model has a head of this
            size.
        image_size: pixels per side of an image; a run uses its encoder's size.
        augment: augmentation of training images; None for the original's: random crops for an NF-ResNet, none for other
            encoders.
        decode: ``exact`` for the original's pixels, or ``fast``, see ``data.batches.stored_images``.
        workers: number of decoding processes; None for one per core, 0 to decode in this process.
        max_skipped: largest fraction of samples that may be skipped as unusable.
    """

    folders: dict[str, tuple[SourceConfig | str, ...]] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    classes: tuple[str, ...] = ()
    image_size: int = 128
    augment: Augment | None = None
    decode: Decode = "exact"
    workers: int | None = None
    max_skipped: float = 0.01
    kind: Literal["folders"] = "folders"

    may_change: ClassVar[tuple[str, ...]] = ("workers", "max_skipped")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "folders", sources_by_split(self.folders))
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped is a share between 0 and 1, got {self.max_skipped}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")
        if self.classes and self.pack > 1:
            raise ValueError("data.classes: samples of classes are not packed; set data.pack to 1")


def open_folders(config: FoldersConfig) -> Dataset:
    """Opens the folders.

    Raises:
        ConfigError: a config without folders. DataError: folders that cannot be read.
    """
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    tokenizer = load_tokenizer(config.tokenizer)
    padding = text_padding(tokenizer)
    sources = sources_by_split(config.folders)
    names = dict.fromkeys(source.path for members in sources.values() for source in members)
    options = ImageOptions(config.image_size, config.decode, config.augment or "none")
    images = StoredImages(tuple(names), options, cores() if config.workers is None else config.workers)
    records = dict(zip(names, images.records, strict=True))
    splits = {
        split: [FolderSamples(records[source.path], source, images.first_row(source.path)) for source in members]
        for split, members in sources.items()
    }
    encode = functools.partial(
        encode_sample,
        tokenizer=tokenizer,
        length=config.length,
        overlong=config.overlong,
        classes=config.classes,
    )
    blank: dict[str, Any] = {name: np.array([value], np.int32) for name, value in padding.items()}
    blank |= {name: np.int32(0) for name in config.counted}

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> FolderBatches:
        drawn = [drawn_samples(source, encode, seed + i, blank) for i, source in enumerate(splits["train"])]
        weights = [source.source.weight or len(source) for source in splits["train"]]
        texts = form_batches(
            grain.MapDataset.mix(drawn, weights),
            batch_size=batch_size,
            length=config.length,
            seed=seed,
            padding=padding,
            rows=rows,
            buckets=config.buckets,
            pack=config.pack,
        )
        return FolderBatches(texts, images, config.max_skipped)

    evaluation = {split: JoinedSamples(members) for split, members in splits.items()}
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        images=images,
        evaluation=evaluation,
        validation_batches=held_out_batches(evaluation, encode, config.length, padding),
        counted=config.counted,
    )
