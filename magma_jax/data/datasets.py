"""Data sets by name: what a config's ``data.name`` stands for."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data import openmoji, openmoji_text
from magma_jax.data.pipeline import Overlong, sample_batches, text_batches
from magma_jax.data.tokenizer import Tokenizer, train_bpe
from magma_jax.training.losses import IGNORED
from magma_jax.typing import UInt8

# The vocabulary that the committed language model was trained with.
QUICKSTART_TOKENIZER = "assets/tokenizer.json"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from.

    Attributes:
        name: ``openmoji`` (captions and questions about drawings), ``openmoji_text`` (text alone, for the
            language model and its vocabulary), or ``folders`` (those that ``python -m magma_jax.data`` wrote).
        folders: split to the folders of ``folders``.
        length: tokens of a block or, at most, of a sample; shorter ones are padded to it.
        buckets: shorter lengths, ascending, that batches of shorter samples are padded to instead; every length in use
            is compiled once.
        pack: how many samples of ``length`` tokens in all may share a row, in place of padding; 1 for one a row.
        overlong: samples of more tokens are an ``error``, or ``truncate`` cuts and counts them.
        image_size: pixels per side of a drawing; pictures of ``folders`` take the encoder's.
        cache_dir: where rasterised drawings are kept between runs.
        weights: how often each source of ``openmoji`` is drawn: captions of people, whose gender is known or open;
            captions of everything else; questions.
        questions: kinds of questions of ``openmoji``, see ``data.openmoji.questions``.
        question_draws: draws of the balanced questions that make up their source.
        lines: lines of text that ``openmoji_text`` composes.
        vocab_size: entries of the vocabulary that ``openmoji_text`` learns.
    """

    name: Literal["openmoji", "openmoji_text", "folders"]
    folders: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    length: int = 32
    buckets: tuple[int, ...] = ()
    pack: int = 1
    overlong: Overlong = "error"
    image_size: int = 128
    cache_dir: str = "~/.cache/magma_jax"
    weights: tuple[float, ...] = (0.375, 0.125, 0.5)
    questions: tuple[str, ...] = ("tone", "gender", "hair", "facing", "what", "count", "hand", "flag")
    question_draws: int = 8
    lines: int = 100_000
    vocab_size: int = 2048

    def __post_init__(self):
        lengths = (0, *self.buckets, self.length)
        if any(shorter >= longer for shorter, longer in itertools.pairwise(lengths)):
            raise ValueError(f"data.buckets {self.buckets} must ascend and stay below data.length {self.length}")
        if self.pack < 1:
            raise ValueError(f"data.pack must be at least 1, got {self.pack}")
        if self.pack > 1 and self.buckets:
            raise ValueError("data.pack fills rows of data.length: set data.buckets to (), or data.pack to 1")
        if self.name == "openmoji_text" and (self.buckets or self.pack > 1):
            raise ValueError("openmoji_text is cut into blocks of data.length; data.buckets and data.pack do not apply")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready to be drawn from.

    Attributes:
        tokenizer: of its texts.
        batches: ``(batch_size, seed, rows)`` to endless batches, of which this process wants ``rows``; see
            ``data.pipeline``.
        images: every picture, uint8 (N, size, size, 3); None for text alone.
        learned: rows of the pictures that may be learned from; all by default.
        evaluation: split to samples, in a fixed order; empty for text alone.
        records: what is known of every picture, in the order of ``images``.
    """

    tokenizer: Tokenizer
    batches: Callable[[int, int, Sequence[int]], grain.IterDataset]
    images: UInt8[np.ndarray, "N H W 3"] | None = None
    learned: Sequence[int] | None = None
    evaluation: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    records: Sequence[Any] = ()


def load_dataset(config: DataConfig) -> Dataset:
    """Loads or builds the data set that a config names.

    Raises:
        ConfigError: data that training does not read yet.
    """
    if config.name == "folders":
        raise ConfigError("data.name folders: training from data set folders is not there yet, only openmoji is")
    return {"openmoji": _openmoji, "openmoji_text": _openmoji_text}[config.name](config)


def _openmoji(config: DataConfig) -> Dataset:
    records, images = openmoji.load(Path(config.cache_dir).expanduser(), config.image_size)
    with resources.as_file(resources.files("magma_jax") / QUICKSTART_TOKENIZER) as path:
        tokenizer = Tokenizer.load(path)
    learned = [record for record in records if record.split == "train"]
    captions = openmoji.captions(learned)
    living = [sample for sample in captions if records[sample.picture].gender is not None]
    things = [sample for sample in captions if records[sample.picture].gender is None]
    # A draw balances the answers by leaving pictures out, so several draws together see more of them.
    ask = functools.partial(openmoji.questions, kinds=config.questions)
    questions = [sample for draw in range(config.question_draws) for sample in ask(learned, draw)]

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        return sample_batches(
            [living, things, questions],
            config.weights,
            tokenizer,
            batch_size=batch_size,
            length=config.length,
            seed=seed,
            rows=rows,
            buckets=config.buckets,
            pack=config.pack,
            overlong=config.overlong,
        )

    evaluation = {"train": captions + ask(learned)}
    for split in ("validation", "test"):
        held_out = [record for record in records if record.split == split]
        evaluation[split] = openmoji.captions(held_out) + ask(held_out)
    rows = [record.index for record in learned]
    return Dataset(tokenizer, batches, images, rows, evaluation, records)


def _openmoji_text(config: DataConfig) -> Dataset:
    records, _ = openmoji.load(Path(config.cache_dir).expanduser(), config.image_size)
    lines = openmoji_text.lines(records, config.lines)
    tokenizer = train_bpe([words + text for words, text in lines], config.vocab_size)
    tokens, labels = [], []
    for words, text in lines:
        given, learned = tokenizer.encode(words), [*tokenizer.encode(text), tokenizer.eos_id]
        tokens += given + learned
        labels += [IGNORED] * len(given) + learned
    arrays = np.array(tokens, np.int32), np.array(labels, np.int32)
    return Dataset(
        tokenizer,
        lambda batch_size, seed, rows: text_batches(
            *arrays, batch_size=batch_size, length=config.length, seed=seed, rows=rows
        ),
    )
