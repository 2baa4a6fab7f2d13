"""OpenMoji as image-text pairs: every drawing with its name, for models that draw and describe."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import grain
import numpy as np

from magma_jax.data.batches.pairs import held_out_pairs, pair_batches
from magma_jax.data.dataset import Dataset
from magma_jax.data.format.records import Sample
from magma_jax.data.openmoji import drawings
from magma_jax.data.tokenizers.captions import CLEAN_UPS
from magma_jax.data.tokenizers.text import TextTokenizerName, TooLong, encode_padded, text_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenmojiPairsConfig:
    """Drawings and their names.

    Attributes:
        image_size: pixels per side of an image; None for the model's.
        length: text tokens, padding included; None for the model's.
        tokenizer: tokenizer of the texts.
        clean_up: clean-up of the captions, see ``data.tokenizers.captions``.
        bpe_dropout: rate at which the tokenizer clip skips a merge in training.
        too_long: captions of more than ``length`` tokens are cut, or an error.
        weights: sampling weights of people, hands and other parts of the body, and of everything else.
        cache_dir: cache folder of rasterised drawings.
    """

    image_size: int | None = None
    length: int | None = None
    tokenizer: TextTokenizerName = "clip"
    clean_up: Literal["none", "pre_caption"] = "none"
    bpe_dropout: float = 0.0
    too_long: TooLong = "error"
    weights: tuple[float, float] = (0.75, 0.25)
    cache_dir: str = "~/.cache/magma_jax"
    kind: Literal["openmoji_pairs"] = "openmoji_pairs"

    may_change: ClassVar[tuple[str, ...]] = ("cache_dir",)

    def __post_init__(self):
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"data.bpe_dropout must be at least 0 and below 1, got {self.bpe_dropout}")
        if self.bpe_dropout and self.tokenizer != "clip":
            raise ValueError(f"data.bpe_dropout {self.bpe_dropout}: only data.tokenizer=clip drops merges; set it to 0")


def open_openmoji_pairs(config: OpenmojiPairsConfig) -> Dataset:
    """Loads the drawings; samples are ``tokens``, ``lengths`` and ``image_rows``.

    Raises:
        ValueError: a config whose sizes are not set.
    """
    if config.image_size is None or config.length is None:
        raise ValueError("data.image_size and data.length must be set")
    records, images = drawings.load(Path(config.cache_dir).expanduser(), config.image_size)
    tokenizer, length = text_tokenizer(config.tokenizer), config.length

    def encode(sample: Sample, rng: random.Random | None) -> dict[str, Any]:
        caption = CLEAN_UPS[config.clean_up](sample.answer.strip())
        dropout = 0.0 if rng is None else config.bpe_dropout
        text = encode_padded(tokenizer, caption, length, too_long=config.too_long, dropout=dropout, rng=rng)
        return {
            "tokens": np.array(text.ids, np.int32),
            "lengths": np.int32(text.length),
            "image_rows": np.int32(sample.image),
        }

    splits = ("train", "validation", "test")
    evaluation = {split: drawings.captions([record for record in records if record.split == split]) for split in splits}
    people, things = [], []
    for sample in evaluation["train"]:
        (things if records[sample.image].kind in ("thing", "flag") else people).append(sample)

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        sources = [people, things]
        return pair_batches(sources, config.weights, encode, batch_size=batch_size, seed=seed, rows=rows)

    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        images=images,
        learned=[record.index for record in records if record.split == "train"],
        evaluation=evaluation,
        records=records,
        validation_batches=held_out_pairs(evaluation, encode),
    )
