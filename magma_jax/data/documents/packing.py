"""Blocks of a fixed number of tokens from shuffled documents; resumable to the exact token.

Documents follow each other without padding. A block's end may cut a text, which the next block continues, but never an
image: no block begins inside an image, or with an image whose text is in the block before. A document whose image would
be cut waits as a whole for the next block, and the room is offered to the documents after it. What remains is padding.

Every process forms the same blocks and takes its own rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.documents.document import Document, RetrievedDocuments
from magma_jax.data.documents.spans import SpanConfig, cm3_block
from magma_jax.data.format.records import DataError
from magma_jax.typing import IGNORED, Int

# Streams of random numbers of one seed.
_DOCUMENTS, _SPANS = 0, 1

# Attributes of a ``BlockIterator`` that its state holds.
_COUNTS = ("skipped", "moved", "padding", "blocks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How documents become blocks.

    Attributes:
        length: tokens that a model reads; a block has one more, the last label.
        spans: the CM3 objective; None for plain next-token prediction.
        overlong: for documents with images that are longer than a block: ``error``, or ``skip``, which counts them.
            A text alone may have any length.
        lookahead: documents that may wait for the next block while later ones are tried.
    """

    length: int = 4096
    spans: SpanConfig | None = SpanConfig()
    overlong: Literal["error", "skip"] = "error"
    lookahead: int = 16

    def __post_init__(self):
        for name, least in (("length", 2), ("lookahead", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass
class _Waiting:
    """A document that has not been used completely: its position in the shuffled order, and the tokens used."""

    position: int
    used: int
    document: Document


class Blocks:
    """Endless batches of blocks; an iterable whose iterator is a ``BlockIterator``.

    Args:
        documents: reshuffled in every epoch.
        config: how they become blocks.
        batch_size: blocks per batch.
        seed: of shuffling, retrieved pairs and spans.
        rows: rows of every batch to return; default: all.

    Raises:
        ValueError: no documents.
    """

    def __init__(
        self,
        documents: RetrievedDocuments,
        config: BlockConfig,
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        if not len(documents):
            raise ValueError("there are no documents to learn from")
        self._documents, self._config, self._seed = documents, config, seed
        self._batch_size, self._rows = batch_size, range(batch_size) if rows is None else tuple(rows)

    def __iter__(self) -> "BlockIterator":
        return BlockIterator(
            self._documents, self._config, batch_size=self._batch_size, seed=self._seed, rows=self._rows
        )


class BlockIterator:
    """Batches of ``tokens`` and ``labels`` (B, length + 1); padding has no label.

    Attributes:
        skipped: documents skipped as longer than a block since the run began.
        moved: documents that waited for a later block because its end would have cut an image.
        padding: tokens of padding.
        blocks: blocks formed.
    """

    def __init__(
        self,
        documents: RetrievedDocuments,
        config: BlockConfig,
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int],
    ):
        self._documents, self._config, self._seed = documents, config, seed
        self._batch_size, self._rows, self._layout = batch_size, rows, documents.layout
        self._order = grain.MapDataset.range(len(documents)).seed(seed).shuffle().repeat()
        self._position = 0  # of the next document in the shuffled order
        self._waiting: list[_Waiting] = []
        self.skipped = self.moved = self.padding = self.blocks = 0

    def __iter__(self) -> "BlockIterator":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: a document with images is longer than a block, or cannot be made.
        """
        blocks = [self._next_block() for _ in range(self._batch_size)]
        tokens = np.stack([blocks[row] for row in self._rows])
        return {"tokens": tokens, "labels": np.where(tokens == self._layout.pad, IGNORED, tokens)}

    def get_state(self) -> dict[str, Any]:
        """Position after the last returned batch, as plain JSON values."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        waiting = [[waiting.position, waiting.used] for waiting in self._waiting]
        return {"position": self._position, "waiting": waiting, **counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which ``get_state`` returned ``state``."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._position = state["position"]
        self._waiting = [_Waiting(position, used, self._draw(position)) for position, used in state["waiting"]]

    def close(self) -> None:
        """Forgets waiting documents; there are no processes to end."""
        self._waiting = []

    def _next_block(self) -> Int[np.ndarray, " S"]:
        size, layout, config = self._config.length + 1, self._layout, self._config
        tokens = self._pack(size)
        if config.spans is not None:
            tokens = cm3_block(
                tokens,
                np.random.default_rng((self._seed, _SPANS, self.blocks)),
                config.spans,
                brk=layout.brk,
                eoss=layout.eoss,
                sentinels=layout.sentinel_ids,
                length=size,
            )
        self.blocks += 1
        self.padding += size - len(tokens)
        return np.pad(tokens, (0, size - len(tokens)), constant_values=layout.pad)

    def _pack(self, size: int) -> Int[np.ndarray, " S"]:
        """Tokens of the next block, at most ``size``."""
        pieces, room, tried = [], size, 0
        while room:
            fresh = tried == len(self._waiting)
            if fresh:
                if tried == self._config.lookahead:
                    break
                self._waiting.append(self._next_document(size))
            waiting = self._waiting[tried]
            tokens, end = waiting.document.tokens, waiting.used + room
            if end < len(tokens) and _cuts_image(waiting.document, end):
                self.moved += fresh
                tried += 1
                continue
            taken = tokens[waiting.used : end]
            pieces.append(taken)
            room -= len(taken)
            waiting.used += len(taken)
            del self._waiting[tried]
            if waiting.used < len(tokens):
                self._waiting.insert(0, waiting)  # the rest of a text begins the next block
        return np.concatenate(pieces)

    def _next_document(self, size: int) -> _Waiting:
        """The next document of the shuffled order that fits in a block."""
        for _ in range(len(self._documents)):
            position = self._position
            self._position += 1
            document = self._draw(position)
            if not document.images or len(document.tokens) <= size:
                return _Waiting(position, 0, document)
            if self._config.overlong == "error":
                raise DataError(
                    f"sample {self._number(position)} has {len(document.tokens)} tokens with its retrieved documents, "
                    f"more than a block of {size}; retrieve fewer, raise data.length or set data.overlong to skip"
                )
            self.skipped += 1
        raise DataError(f"every document is longer than a block of {size} tokens; retrieve fewer or raise data.length")

    def _draw(self, position: int) -> Document:
        """The document at a position of the shuffled order."""
        rng = np.random.default_rng((self._seed, _DOCUMENTS, position))
        return self._documents.draw(self._number(position), rng)

    def _number(self, position: int) -> int:
        number = self._order[position]
        assert number is not None  # no document is filtered out of the order
        return int(number)


def _cuts_image(document: Document, end: int) -> bool:
    """Whether a block that ends before token ``end`` separates an image, or it and its ``<break>``, from its text."""
    return any(start - 1 <= end < stop for start, stop in document.images)
