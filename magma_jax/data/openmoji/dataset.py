"""OpenMoji datasets: captions and questions about the drawings, or text only."""

import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import grain
import numpy as np

from magma_jax.data.batches.held_out import held_out_batches
from magma_jax.data.batches.pipeline import encode_sample, sample_batches, text_batches, text_padding
from magma_jax.data.dataset import Dataset, SamplesConfig
from magma_jax.data.openmoji import drawings, text
from magma_jax.data.tokenizers.byte_level import Tokenizer, train_bpe
from magma_jax.data.tokenizers.load import load_tokenizer
from magma_jax.typing import IGNORED

# Vocabulary of the language model in the repository.
QUICKSTART_TOKENIZER = "assets/tokenizer.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenmojiConfig(SamplesConfig):
    """Captions and questions about drawings.

    Attributes:
        image_size: pixels per side of an image.
        tokenizer: tokenizer, see ``data.tokenizers.load``; None for that of the quick start's language model.
        cache_dir: cache folder of rasterised drawings.
        weights: sampling weights of the sources: captions of people of known or open gender, captions of everything
            else, questions; 0 leaves a source out.
        questions: kinds of questions, see ``data.openmoji.drawings.questions``.
        question_draws: number of balanced draws that form the source of questions.
    """

    image_size: int = 128
    tokenizer: str | None = None
    cache_dir: str = "~/.cache/magma_jax"
    weights: tuple[float, ...] = (0.375, 0.125, 0.5)
    questions: tuple[str, ...] = ("tone", "gender", "hair", "facing", "what", "count", "hand", "flag")
    question_draws: int = 8
    kind: Literal["openmoji"] = "openmoji"

    may_change: ClassVar[tuple[str, ...]] = ("cache_dir",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenmojiTextConfig:
    """Text about the drawings, cut into blocks, to train a language model and its vocabulary.

    Attributes:
        length: tokens per block.
        cache_dir: cache folder of rasterised drawings.
        lines: number of generated lines of text.
        vocab_size: size of the vocabulary trained on them.
    """

    length: int = 32
    cache_dir: str = "~/.cache/magma_jax"
    lines: int = 100_000
    vocab_size: int = 2048
    kind: Literal["openmoji_text"] = "openmoji_text"

    may_change: ClassVar[tuple[str, ...]] = ("cache_dir",)
    pack: ClassVar[int] = 1  # a block fills its row


def open_openmoji(config: OpenmojiConfig) -> Dataset:
    """Loads the drawings and creates their samples."""
    records, images = drawings.load(Path(config.cache_dir).expanduser(), config.image_size)
    tokenizer = _quickstart_tokenizer() if config.tokenizer is None else load_tokenizer(config.tokenizer)
    learned = [record for record in records if record.split == "train"]
    captions = drawings.captions(learned)
    living = [sample for sample in captions if records[sample.image].gender is not None]
    things = [sample for sample in captions if records[sample.image].gender is None]
    # A draw drops images to balance the answers, so several draws cover more images.
    ask = functools.partial(drawings.questions, kinds=config.questions)
    questions = [sample for draw in range(config.question_draws) for sample in ask(learned, draw)]

    sources = [living, things, questions]

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        return sample_batches(
            [source for source, weight in zip(sources, config.weights, strict=True) if weight],
            [weight for weight in config.weights if weight],
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
        evaluation[split] = drawings.captions(held_out) + ask(held_out)
    encode = functools.partial(encode_sample, tokenizer=tokenizer, length=config.length, overlong=config.overlong)
    return Dataset(
        tokenizer=tokenizer,
        batches=batches,
        images=images,
        learned=[record.index for record in learned],
        evaluation=evaluation,
        records=records,
        validation_batches=held_out_batches(evaluation, encode, config.length, text_padding(tokenizer)),
        counted=config.counted,
    )


def _quickstart_tokenizer() -> Tokenizer:
    with resources.as_file(resources.files("magma_jax") / QUICKSTART_TOKENIZER) as path:
        return Tokenizer.load(path)


def open_openmoji_text(config: OpenmojiTextConfig) -> Dataset:
    """Generates lines of text and trains their vocabulary."""
    records, _ = drawings.load(Path(config.cache_dir).expanduser(), OpenmojiConfig.image_size)
    lines = text.lines(records, config.lines)
    tokenizer = train_bpe([words + answer for words, answer in lines], config.vocab_size)
    tokens, labels = [], []
    for words, answer in lines:
        given, learned = tokenizer.encode(words), [*tokenizer.encode(answer), tokenizer.eos_id]
        tokens += given + learned
        labels += [IGNORED] * len(given) + learned
    arrays = np.array(tokens, np.int32), np.array(labels, np.int32)

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> grain.IterDataset:
        return text_batches(*arrays, batch_size=batch_size, length=config.length, seed=seed, rows=rows)

    return Dataset(tokenizer=tokenizer, batches=batches)
