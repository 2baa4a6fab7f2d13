"""Mixtures of folders of codes and texts written by ``python -m magma_jax.data encode``."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import grain
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.held_out import held_out_batches
from magma_jax.data.batches.pipeline import encode_sample, form_batches, text_padding
from magma_jax.data.batches.sources import FolderSamples, JoinedSamples, SourceConfig, sources_by_split
from magma_jax.data.dataset import Dataset, SamplesConfig
from magma_jax.data.format.code_folder import Codes, StoredCodes
from magma_jax.data.tokenizers.load import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesConfig(SamplesConfig):
    """Folders of codes and texts.

    Attributes:
        folders: split to the folders mixed in it, each a path or a ``SourceConfig``.
        tokenizer: of the texts: ``gpt2``, a ``tokenizer.json`` or its folder; None for the tokenizer of the run's
            ``base``, or ``gpt2`` without one.
        views: whether training draws one of the stored views of an image each time, or uses the ``first``.
    """

    folders: dict[str, tuple[SourceConfig | str, ...]] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    views: Literal["drawn", "first"] = "drawn"
    kind: Literal["codes"] = "codes"

    may_change: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "folders", sources_by_split(self.folders))


def open_codes(config: CodesConfig) -> Dataset:
    """Opens the folders; batches have ``codes`` (B, L) where others have images.

    Raises:
        ConfigError: a config without folders. DataError: folders that cannot be read, or of different tokenizers.
    """
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    tokenizer = load_tokenizer(config.tokenizer)
    padding = text_padding(tokenizer)
    sources = sources_by_split(config.folders)
    stored = {source.path: StoredCodes(source.path) for members in sources.values() for source in members}
    codes = Codes(list(stored.values()))
    first_rows = dict(zip(stored, codes.starts.tolist(), strict=False))
    splits = {
        split: [FolderSamples(stored[source.path], source, first_rows[source.path]) for source in members]
        for split, members in sources.items()
    }
    encode = functools.partial(encode_sample, tokenizer=tokenizer, length=config.length, overlong=config.overlong)

    def drawn(source: FolderSamples, seed: int) -> grain.MapDataset:
        def encoded(index: int, number: int) -> dict[str, Any]:
            rng = np.random.default_rng((seed, index))
            return encode(source.draw(number, rng)) | {"draws": rng.integers(2**62)}

        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().map_with_index(encoded)

    def with_codes(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        draws = batch.get("draws") if config.views == "drawn" else None
        return batch | {"codes": codes.of(batch["image_rows"], draws)}

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        weights = [source.source.weight or len(source) for source in splits["train"]]
        texts = form_batches(
            grain.MapDataset.mix([drawn(source, seed + i) for i, source in enumerate(splits["train"])], weights),
            batch_size=batch_size,
            length=config.length,
            seed=seed,
            padding=padding,
            rows=rows,
            buckets=config.buckets,
            pack=config.pack,
        )
        return texts.map(with_codes)

    evaluation = {split: JoinedSamples(members) for split, members in splits.items()}
    held_out = held_out_batches(evaluation, encode, config.length, padding)
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        codes=codes,
        evaluation=evaluation,
        validation_batches=lambda *arguments: [with_codes(batch) for batch in held_out(*arguments)],
        counted=config.counted,
    )
