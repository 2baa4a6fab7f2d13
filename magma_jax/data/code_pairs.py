"""Folders of codes as image-text pairs, for models that draw, describe, and answer questions by classes."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import grain
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.pairs import held_out_pairs, pair_batches
from magma_jax.data.batches.sources import FolderSamples, JoinedSamples, SourceConfig, sources_by_split
from magma_jax.data.dataset import Dataset
from magma_jax.data.format.code_folder import Codes, StoredCodes
from magma_jax.data.tokenizers.captions import CLEAN_UPS
from magma_jax.data.tokenizers.text import TextTokenizerName, TooLong, encode_padded, text_tokenizer
from magma_jax.typing import IGNORED


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodePairsConfig:
    """Folders written by ``python -m magma_jax.data encode``, each image with one of its captions.

    Attributes:
        folders: split to the folders mixed in it, each a path or a ``SourceConfig``.
        length: text tokens, padding included; None for the model's.
        tokenizer: tokenizer of the texts.
        clean_up: clean-up of the captions, see ``data.tokenizers.captions``.
        bpe_dropout: rate at which the tokenizer clip skips a merge in training.
        too_long: captions of more than ``length`` tokens are cut, or an error.
        classes: answers to questions, in the order of a classifier's outputs; the pairs are then the folders'
            questions, not their captions. Other answers teach nothing.
    """

    folders: dict[str, tuple[SourceConfig | str, ...]] = dataclasses.field(default_factory=dict)
    length: int | None = None
    tokenizer: TextTokenizerName = "clip"
    clean_up: Literal["none", "pre_caption"] = "pre_caption"
    bpe_dropout: float = 0.0
    too_long: TooLong = "cut"
    classes: tuple[str, ...] = ()
    kind: Literal["code_pairs"] = "code_pairs"

    may_change: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"data.bpe_dropout must be at least 0 and below 1, got {self.bpe_dropout}")
        if self.bpe_dropout and self.tokenizer != "clip":
            raise ValueError(f"data.bpe_dropout {self.bpe_dropout}: only data.tokenizer=clip drops merges; set it to 0")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("data.classes: an answer is there twice")
        object.__setattr__(self, "folders", sources_by_split(self.folders))


def open_code_pairs(config: CodePairsConfig) -> Dataset:
    """Opens the folders; samples are ``tokens``, ``lengths`` and ``codes``, and with classes ``labels``.

    In training an image gives one of its views and one of its captions, drawn anew each time; with classes one of the
    answers to a question, whose label is ``IGNORED`` if it is no class.

    Raises:
        ConfigError: a config without folders. DataError: folders that cannot be read, or of different tokenizers.
    """
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    if config.length is None:
        raise ConfigError("data.length must be set")
    tokenizer, length = text_tokenizer(config.tokenizer), config.length
    numbers = {name: number for number, name in enumerate(config.classes)}
    texts = {"texts": "questions", "question_prompt": "{}"} if numbers else {"texts": "captions", "caption_prompt": ""}
    sources = {
        split: [dataclasses.replace(source, **texts) for source in members]
        for split, members in sources_by_split(config.folders).items()
    }
    stored = {source.path: StoredCodes(source.path) for members in sources.values() for source in members}
    codes = Codes(list(stored.values()))
    first_rows = dict(zip(stored, codes.starts.tolist(), strict=False))
    splits = {
        split: [FolderSamples(stored[source.path], source, first_rows[source.path]) for source in members]
        for split, members in sources.items()
    }

    def encode(given: Any, rng: random.Random | None) -> dict[str, Any]:
        if rng is None:
            sample, draw = given, None
        else:
            source, row = given
            sample = source.draw(row, np.random.default_rng(rng.getrandbits(64)))
            draw = np.asarray(rng.getrandbits(62))
        caption = CLEAN_UPS[config.clean_up]((sample.prompt if numbers else sample.answer).strip())
        dropout = 0.0 if rng is None else config.bpe_dropout
        text = encode_padded(tokenizer, caption, length, too_long=config.too_long, dropout=dropout, rng=rng)
        found = {
            "tokens": np.array(text.ids, np.int32),
            "lengths": np.int32(text.length),
            "codes": codes.of(np.asarray(sample.image), draw),
        }
        return found | ({"labels": np.int32(numbers.get(sample.answer.strip(), IGNORED))} if numbers else {})

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        weights = [float(source.source.weight or len(source)) for source in splits["train"]]
        numbered = [_Numbered(source) for source in splits["train"]]
        return pair_batches(numbered, weights, encode, batch_size=batch_size, seed=seed, rows=rows)

    evaluation = {split: JoinedSamples(members) for split, members in splits.items()}
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        codes=codes,
        evaluation=evaluation,
        validation_batches=held_out_pairs(evaluation, encode),
    )


class _Numbered(Sequence):
    """The samples of a folder by number, unread."""

    def __init__(self, source: FolderSamples):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: Any) -> tuple[FolderSamples, int]:
        return self._source, int(number)
