"""Datasets by name: what a config's ``data.name`` stands for."""

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
from magma_jax.data.batches.folders import FolderBatches, drawn_samples
from magma_jax.data.batches.pipeline import Overlong, encode_sample, form_batches, sample_batches, text_batches
from magma_jax.data.batches.sources import FolderSamples, JoinedSamples, SourceConfig
from magma_jax.data.batches.stored_images import Augment, Decode, ImageOptions, StoredImages
from magma_jax.data.format.records import Sample
from magma_jax.data.openmoji import drawings as openmoji
from magma_jax.data.openmoji import text as openmoji_text
from magma_jax.data.tokenizers.byte_level import Tokenizer, gpt2_tokenizer, train_bpe
from magma_jax.data.workers import cores
from magma_jax.typing import IGNORED, UInt8

# The vocabulary that the committed language model was trained with.
QUICKSTART_TOKENIZER = "assets/tokenizer.json"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from.

    Attributes:
        name: ``openmoji`` (captions and questions about drawings), ``openmoji_text`` (text alone, for the
            language model and its vocabulary), or ``folders`` (those that ``python -m magma_jax.data`` wrote).
        folders: split to the folders of ``folders`` that are mixed in it: paths, or a ``SourceConfig`` each.
        tokenizer: of ``folders``: ``gpt2``, a ``tokenizer.json`` or the folder of one; None for that of the run's
            ``base``, or ``gpt2`` without one.
        classes: names of classes, which the answers of ``folders`` are then; the model has a head with as many.
        length: tokens of a block or, at most, of a sample; shorter ones are padded to it.
        buckets: shorter lengths, ascending, that batches of shorter samples are padded to instead; every length in use
            is compiled once.
        pack: how many samples of ``length`` tokens in all may share a row, in place of padding; 1 for one a row.
        overlong: samples of more tokens are an ``error``, or ``truncate`` cuts and counts them.
        image_size: pixels per side of an image; images of ``folders`` take the encoder's.
        augment: of images of ``folders`` that are learned from; None for that of the original, which crops at random
            for an NF-ResNet and does nothing for other encoders.
        decode: pixels of ``folders`` ``exact`` as the original's, or ``fast``, see ``data.batches.stored_images``.
        workers: processes that decode images of ``folders``; None for one a core, 0 for none but the run's own.
        max_skipped: share of the samples of ``folders`` that may be left out because they cannot be used.
        cache_dir: where rasterised drawings are kept between runs.
        weights: how often each source of ``openmoji`` is drawn: captions of people, whose gender is known or open;
            captions of everything else; questions.
        questions: kinds of questions of ``openmoji``, see ``data.openmoji.drawings.questions``.
        question_draws: draws of the balanced questions that make up their source.
        lines: lines of text that ``openmoji_text`` composes.
        vocab_size: entries of the vocabulary that ``openmoji_text`` learns.
    """

    name: Literal["openmoji", "openmoji_text", "folders"]
    folders: dict[str, tuple[SourceConfig | str, ...]] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    classes: tuple[str, ...] = ()
    length: int = 32
    buckets: tuple[int, ...] = ()
    pack: int = 1
    overlong: Overlong = "error"
    image_size: int = 128
    augment: Augment | None = None
    decode: Decode = "exact"
    workers: int | None = None
    max_skipped: float = 0.01
    cache_dir: str = "~/.cache/magma_jax"
    weights: tuple[float, ...] = (0.375, 0.125, 0.5)
    questions: tuple[str, ...] = ("tone", "gender", "hair", "facing", "what", "count", "hand", "flag")
    question_draws: int = 8
    lines: int = 100_000
    vocab_size: int = 2048

    def __post_init__(self):
        sources = {
            split: tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in members)
            for split, members in self.folders.items()
        }
        object.__setattr__(self, "folders", sources)
        for split, members in sources.items():
            if len({source.weight is None for source in members}) > 1:
                raise ValueError(f"data.folders.{split}: give all of its folders a weight, or none")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"data.max_skipped is a share between 0 and 1, got {self.max_skipped}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers must not be negative, got {self.workers}")
        if self.classes and self.pack > 1:
            raise ValueError("data.classes: samples of classes are not packed; set data.pack to 1")
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
    """A dataset ready to be drawn from.

    Attributes:
        tokenizer: of its texts.
        batches: ``(batch_size, seed, rows)`` to endless batches, of which this process wants ``rows``; see
            ``data.batches.pipeline``.
        images: every image, uint8 (N, size, size, 3), in memory or decoded when asked for; None for text alone.
        learned: rows of the images that may be learned from; all by default.
        evaluation: split to samples, in a fixed order, in memory or read when asked for; empty for text alone.
        records: what is known of every image, in the order of ``images``.
        held_out: ``(split, limit, batch_size, rows)`` to the batches of up to ``limit`` samples that a run is validated
            on, of which this process wants ``rows``; None for those made of ``evaluation``.
    """

    tokenizer: Tokenizer
    batches: Callable[[int, int, Sequence[int]], grain.IterDataset | FolderBatches]
    images: UInt8[np.ndarray, "N H W 3"] | StoredImages | None = None
    learned: Sequence[int] | None = None
    evaluation: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    records: Sequence[Any] = ()
    held_out: Callable[[str, int, int, Sequence[int]], list[dict[str, np.ndarray]]] | None = None


def load_dataset(config: DataConfig) -> Dataset:
    """Loads, builds or opens the dataset that a config names.

    Raises:
        ConfigError: a config that names no folders. DataError: folders that cannot be read.
    """
    return {"openmoji": _openmoji, "openmoji_text": _openmoji_text, "folders": _folders}[config.name](config)


def _openmoji(config: DataConfig) -> Dataset:
    records, images = openmoji.load(Path(config.cache_dir).expanduser(), config.image_size)
    with resources.as_file(resources.files("magma_jax") / QUICKSTART_TOKENIZER) as path:
        tokenizer = Tokenizer.load(path)
    learned = [record for record in records if record.split == "train"]
    captions = openmoji.captions(learned)
    living = [sample for sample in captions if records[sample.image].gender is not None]
    things = [sample for sample in captions if records[sample.image].gender is None]
    # A draw balances the answers by leaving images out, so several draws together see more of them.
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


def _folders(config: DataConfig) -> Dataset:
    if not config.folders.get("train"):
        raise ConfigError("data.folders names no folders to train on; set data.folders.train")
    tokenizer = _tokenizer(config.tokenizer)
    names = dict.fromkeys(source.path for members in config.folders.values() for source in members)
    options = ImageOptions(config.image_size, config.decode, config.augment or "none")
    images = StoredImages(tuple(names), options, cores() if config.workers is None else config.workers)
    records = dict(zip(names, images.records, strict=True))
    splits = {
        split: [FolderSamples(records[source.path], source, images.first_row(source.path)) for source in members]
        for split, members in config.folders.items()
    }

    def encode(sample: Sample) -> dict[str, Any]:
        return encode_sample(sample, tokenizer, config.length, overlong=config.overlong, classes=config.classes)

    blank = {"tokens": np.array([tokenizer.pad_id], np.int32), "labels": np.array([IGNORED], np.int32)}
    blank |= {"truncated": np.int32(0)} if config.overlong == "truncate" else {}

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> FolderBatches:
        drawn = [drawn_samples(source, encode, seed + i, blank) for i, source in enumerate(splits["train"])]
        weights = [source.source.weight or len(source) for source in splits["train"]]
        texts = form_batches(
            grain.MapDataset.mix(drawn, weights),
            batch_size=batch_size,
            length=config.length,
            seed=seed,
            pad_id=tokenizer.pad_id,
            rows=rows,
            buckets=config.buckets,
            pack=config.pack,
        )
        return FolderBatches(texts, images, config.max_skipped)

    evaluation = {split: JoinedSamples(members) for split, members in splits.items()}
    return Dataset(tokenizer, batches, images, evaluation=evaluation)


def _tokenizer(name: str | None) -> Tokenizer:
    if name in (None, "gpt2"):
        return gpt2_tokenizer()
    path = Path(name)
    # A model folder keeps its vocabulary in a folder of its own.
    path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not path.exists():
        raise ConfigError(f"data.tokenizer: {path} is not there; give gpt2, a tokenizer.json or its folder")
    return Tokenizer.load(path)
