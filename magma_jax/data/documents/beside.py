"""Documents whose retrieved images stand beside the sequence: one document a row, with the codes of these images.

    <eos> T1 <break> T2 <break> T <break> I <eos>

T1 and T2 are the texts of retrieved images, T and I the text and image to learn. The codes of the retrieved images are
an array of their own, see ``magma_jax.models.references``.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.held_out import spaced_samples
from magma_jax.data.documents.document import Image, Parts, Text
from magma_jax.data.documents.spans import Span, SpanConfig, clip_spans, draw_spans, move_spans
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import IGNORED, Int

# Streams of random numbers of one seed; the first two are those of packed blocks.
_DRAW = 2

# Sizes of captions where a model does not say other ones.
CAPTION_WORDS, WORD_ROWS = 16, 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideConfig:
    """How documents with retrieved images beside them are drawn.

    Attributes:
        images: retrieved images a document; 0 for retrieved documents in the sequence.
        caption_words: words of a caption; None for the model's.
        word_rows: rows of the table of words; None for the model's.
        by_image: folder of an annotation by image, for documents whose text is moved: retrieved by their own text, they
            would give it away. None for the same annotation.
        captions: how often the text is moved behind the image as a whole, before any spans are drawn, so that the model
            learns to describe.
        skipped: how often a retrieved image is left out.
        masked: share of the codes of a retrieved image that are left out, at most; a share is drawn for every image.
        any_order: whether retrieved images come in any order, instead of the best first.
        weights: sampling weights of people of known or open gender and hands, and of everything else.
    """

    images: int = 0
    caption_words: int | None = None
    word_rows: int | None = None
    by_image: str | None = None
    captions: float = 0.0
    skipped: float = 0.05
    masked: float = 0.0
    any_order: bool = False
    weights: tuple[float, float] = (0.75, 0.25)

    def __post_init__(self):
        for name in ("captions", "skipped", "masked"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.beside.{name} must be 0 to 1, got {getattr(self, name)}")
        if self.images < 0:
            raise ValueError(f"data.beside.images must be at least 0, got {self.images}")


class Row(NamedTuple):
    """A row of a batch: tokens and places (S,), codes of retrieved images (K, T), captions (K + 1, L)."""

    tokens: Int[np.ndarray, " S"]
    places: Int[np.ndarray, " S"]
    references: Int[np.ndarray, "K T"]
    captions: Int[np.ndarray, "K1 L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideDocuments:
    """Documents to learn, and what may be retrieved for them.

    Attributes:
        queries: texts and image of every document; the image is the last part.
        memory: pairs of text and image.
        neighbours: rows of ``memory`` for every query, best first.
        by_image: the same, found by image; None for ``neighbours``.
        groups: rows of the queries of each sampling group.
        decode: tokens to a text.
        layout, image_tokens: vocabulary, and codes of every image.
        config: how they are drawn; its sizes are set.
        least: retrieved images that every document must have; None for as many as it may.
    """

    queries: Sequence[Parts]
    memory: Sequence[Parts]
    neighbours: Sequence[Any]
    by_image: Sequence[Any] | None
    groups: Sequence[Sequence[int]]
    layout: VocabLayout
    image_tokens: int
    decode: Callable[[list[int]], str]
    config: BesideConfig
    least: int | None = None

    def row(
        self,
        number: int,
        rng: np.random.Generator | None,
        spans: SpanConfig | None,
    ) -> tuple[Row, int]:
        """A document's row, and where the part to learn begins; without ``rng`` nothing is left out or moved."""
        layout, config = self.layout, self.config
        parts = self.queries[number]
        query, kinds = _query(parts, layout)
        places = np.where(kinds >= 0, kinds, -1)
        text = kinds == -2
        moved: list[Span] = []
        if rng is not None and rng.random() < config.captions:
            moved = [(int(np.flatnonzero(text)[0]), int(np.flatnonzero(text)[-1]) + 1)]
        elif rng is not None and spans is not None:
            segments = _segments(query, layout.brk)
            drawn = draw_spans(len(query), segments, rng, spans, most=len(layout.sentinel_ids))
            moved = clip_spans(drawn, segments)
        hidden = np.zeros(len(query), bool)
        for start, stop in moved:
            hidden[start:stop] = True
        lists = self.neighbours
        if self.by_image is not None and text.any() and hidden[text].all():
            lists = self.by_image
        chosen = [self.memory[row] for row in self._choose(np.asarray(lists[number]), rng)]
        prefix = [layout.eos]
        for pair in chosen:
            prefix += [*_text(pair, layout).tolist(), layout.brk]
        tokens = np.concatenate([prefix, query[1:]]).astype(np.int32)
        spots = np.concatenate([np.full(len(prefix), -1), places[1:]]).astype(np.int32)
        shift = len(prefix) - 1
        spans_here = [(start + shift, stop + shift) for start, stop in moved]
        length = len(tokens) + 3 * len(moved)
        tokens, spots = (
            move_spans(array, spans_here, marks, end, length=length)
            for array, marks, end in (
                (tokens, layout.sentinel_ids, layout.eoss),
                (spots, [-1] * len(layout.sentinel_ids), -1),
            )
        )
        references = np.full((config.images, self.image_tokens), layout.pad, np.int32)
        for place, pair in enumerate(chosen):
            references[place] = _codes(pair, layout)
            if rng is not None and config.masked:
                references[place, rng.random(self.image_tokens) < rng.random() * config.masked] = layout.pad
        texts = [query[text & ~hidden], *(_text(pair, layout) for pair in chosen)]
        captions = caption_rows(
            [self.decode(layout.to_text(ids).tolist()) for ids in texts],
            config.images,
            config.caption_words or CAPTION_WORDS,
            config.word_rows or WORD_ROWS,
        )
        return Row(tokens, spots, references, captions), shift

    def _choose(self, found: Int[np.ndarray, " K"], rng: np.random.Generator | None) -> list[int]:
        config = self.config
        least = config.images if self.least is None else self.least
        if len(found) < least:
            raise DataError(
                f"a sample has {len(found)} retrieved documents, not {least}; retrieve more, or lower "
                "data.beside.images"
            )
        if rng is None:
            return found[: config.images].tolist()
        if config.any_order:
            found = rng.permutation(found)
        return [int(row) for row in found[: config.images] if rng.random() >= config.skipped]


def caption_rows(texts: Sequence[str], images: int, size: int, rows: int) -> Int[np.ndarray, "K1 L"]:
    """Hashed words of captions, 1 to ``rows`` - 1, at the right of their rows; of longer captions the last words.

    Words instead of tokens, so that the same slot of two names, such as the left one of two skin tones, is as far from
    the end.
    """
    found = np.zeros((images + 1, size), np.int32)
    for row, text in enumerate(texts):
        words = [_word_id(word, rows) for word in text.split()[-size:]]
        found[row, size - len(words) :] = words
    return found


@functools.cache
def _word_id(word: str, rows: int) -> int:
    return 1 + int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") % (rows - 1)


class BesideRows:
    """Endless batches of rows, padded to ``length`` + 1 tokens; an iterable whose iterator resumes by its position."""

    def __init__(
        self,
        documents: BesideDocuments,
        spans: SpanConfig | None,
        length: int,
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int],
    ):
        self._documents, self._spans = documents, spans
        self._length, self._batch_size, self._seed, self._rows = length, batch_size, seed, rows
        self._position = 0

    def __iter__(self) -> "BesideRows":
        return self

    def __next__(self) -> Batch:
        first = self._position
        self._position += self._batch_size
        found = [self._row(first + row) for row in self._rows]
        starts = [start for _, start in found]
        return as_batch([row for row, _ in found], self._length, self._documents.layout.pad, starts)

    def get_state(self) -> dict[str, Any]:
        """Position after the last returned batch."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which ``get_state`` returned ``state``."""
        self._position = state["position"]

    def close(self) -> None:
        """There are no processes to end."""

    def _row(self, position: int) -> tuple[Row, int]:
        rng = np.random.default_rng((self._seed, _DRAW, position))
        groups = self._documents.groups
        weights = np.array(
            [len(group) and weight for group, weight in zip(groups, self._documents.config.weights, strict=True)]
        )
        group = groups[int(rng.choice(len(groups), p=weights / weights.sum()))]
        # With replacement, so that the position is all that a resumed run needs.
        number = int(group[int(rng.integers(len(group)))])
        return self._documents.row(number, rng, self._spans)


def as_batch(rows: Sequence[Row], length: int, pad: int, starts: Sequence[int]) -> Batch:
    """Rows as arrays of ``length`` + 1 tokens; labels begin at ``starts``, behind the texts of retrieved images."""
    size = length + 1
    tokens = np.full((len(rows), size), pad, np.int32)
    places = np.full((len(rows), size), -1, np.int32)
    for number, row in enumerate(rows):
        if len(row.tokens) > size:
            raise DataError(f"a document has {len(row.tokens)} tokens, more than data.length + 1 = {size}; raise it")
        tokens[number, : len(row.tokens)] = row.tokens
        places[number, : len(row.tokens)] = row.places
    labels = np.where(tokens == pad, IGNORED, tokens)
    for number, start in enumerate(starts):
        labels[number, :start] = IGNORED
    return {
        "tokens": tokens,
        "labels": labels,
        "places": places,
        "references": np.stack([row.references for row in rows]),
        "captions": np.stack([row.captions for row in rows]),
    }


def beside_batches(documents: BesideDocuments, config: Any) -> Callable[[int, int, Sequence[int]], BesideRows]:
    """Creates the ``Dataset.batches`` of documents; ``config`` has the fields of ``packing.BlockConfig``."""

    def batches(batch_size: int, seed: int, rows: Sequence[int]) -> BesideRows:
        return BesideRows(documents, config.spans, config.length, batch_size=batch_size, seed=seed, rows=rows)

    return batches


def held_out_beside(
    splits: Mapping[str, BesideDocuments], length: int
) -> Callable[[str, int, int, Sequence[int]], list[Batch]]:
    """Creates the ``Dataset.validation_batches`` of documents in splits, without moved spans."""

    def batches(split: str, limit: int, batch_size: int, rows: Sequence[int]) -> list[Batch]:
        numbers = spaced_samples({name: range(len(one.queries)) for name, one in splits.items()}, split, limit)
        documents = splits[split]
        found = [documents.row(number, None, None) for number in numbers]
        size = -(-len(found) // batch_size) * batch_size  # the last batch is filled with rows without labels
        batch = as_batch([row for row, _ in found], length, documents.layout.pad, [start for _, start in found])
        empty = {"labels": IGNORED, "places": -1}
        padded = {
            name: np.concatenate(
                [array, np.full((size - len(array), *array.shape[1:]), empty.get(name, documents.layout.pad), np.int32)]
            )
            for name, array in batch.items()
        }
        parts = [np.arange(first, first + batch_size)[list(rows)] for first in range(0, size, batch_size)]
        return [{name: array[part] for name, array in padded.items()} for part in parts]

    return batches


def _query(parts: Parts, layout: VocabLayout) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a document, and the place of every image code; -1 for other ids, -2 for those of texts."""
    ids, kinds = [np.array([layout.eos])], [np.array([-1])]
    for number, part in enumerate(parts):
        if number:
            ids.append(np.array([layout.brk]))
            kinds.append(np.array([-1]))
        if isinstance(part, Image):
            ids.append(layout.from_codes(part.codes))
            kinds.append(np.arange(len(part.codes)))
        else:
            ids.append(layout.from_text(part.tokens))
            kinds.append(np.full(len(part.tokens), -2))
    ids.append(np.array([layout.eos]))
    kinds.append(np.array([-1]))
    return np.concatenate(ids).astype(np.int32), np.concatenate(kinds).astype(np.int32)


def _segments(query: Int[np.ndarray, " S"], brk: int) -> list[Span]:
    """Texts and images, without the ``<eos>`` at both ends."""
    breaks = [int(place) for place in np.flatnonzero(query == brk)]
    return list(zip([1, *(place + 1 for place in breaks)], [*breaks, len(query) - 1], strict=True))


def _text(pair: Parts, layout: VocabLayout) -> Int[np.ndarray, " N"]:
    part = pair[0]
    assert isinstance(part, Text)  # a pair is a text and its image
    return layout.from_text(part.tokens)


def _codes(pair: Parts, layout: VocabLayout) -> Int[np.ndarray, " T"]:
    part = pair[-1]
    assert isinstance(part, Image)
    return layout.from_codes(part.codes)
