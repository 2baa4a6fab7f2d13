"""Documents for a text at inference: what a memory bank holds that fits it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magma_jax.data.documents.bank import MemoryBank, open_bank
from magma_jax.data.format.records import DataError
from magma_jax.retrieval.annotate import check_encoder
from magma_jax.retrieval.encoders import Encoder, open_encoder
from magma_jax.retrieval.search import Index, make_index
from magma_jax.retrieval.selection import MAX_SIMILARITY, cover, select_documents
from magma_jax.retrieval.sources import Documents, open_documents


class Memory:
    """Finds documents by text.

    Args:
        bank: the documents.
        encoder: the one that made the bank.
        data: where their images are; None if the bank holds codes.
        image_size: pixels per side of those images.
        count: documents of a text.
        candidates: documents among which those are chosen.
        max_similarity: largest cosine between two of them.
        decay: see ``selection.cover``.
        index: index of the bank; None for an exact one.

    Raises:
        DataError: a bank of another encoder, or one without codes and no data, or data without its documents.
    """

    def __init__(
        self,
        bank: MemoryBank,
        encoder: Encoder,
        data: Documents | None = None,
        *,
        image_size: int = 256,
        count: int = 2,
        candidates: int = 128,
        max_similarity: float = MAX_SIMILARITY,
        decay: float = 1.0,
        index: Index | None = None,
    ):
        check_encoder(bank, encoder)
        if not 1 <= count <= candidates:
            raise DataError(f"there are {candidates} candidates for {count} documents; give at least one, and as many")
        self._bank, self._encoder, self._data, self._size = bank, encoder, data, image_size
        self._count, self._candidates = count, candidates
        self._max_similarity, self._decay = max_similarity, decay
        self._index = make_index(bank.vectors) if index is None else index
        if data is None and bank.codes is None:
            raise DataError(f"{bank.folder}: holds no codes of its images; say which data has these")
        self._rows = {} if data is None else {entry.id: row for row, entry in enumerate(data.entries)}
        if data is not None and (absent := [one.id for one in bank.entries if one.id not in self._rows]):
            raise DataError(
                f"{data.name}: has no document {absent[0]!r} of {bank.folder}; name the data it was made of"
            )

    def __call__(self, text: str) -> list[tuple[str, Any]]:
        """Texts and images, or codes (T,), of the documents of a text, best first."""
        query = self._encoder.texts([text])
        found = self._index.search(query, self._candidates).rows[0]
        rows: Sequence[int] = [int(row) for row in found if row >= 0]
        if self._decay < 1:
            rows = cover(rows, self._bank.vectors, query[0], self._decay, self._count)
        chosen = select_documents(rows, self._bank.vectors, self._count, max_similarity=self._max_similarity)
        return [(self._bank.entries[row].text, self._image(row)) for row in chosen]

    def _image(self, row: int) -> Any:
        if self._data is None:
            assert self._bank.codes is not None  # checked at the start
            return np.asarray(self._bank.codes[row], np.int32)
        pixels = self._data.pixels([self._rows[self._bank.entries[row].id]], self._size)
        if pixels is None:
            raise DataError(f"{self._data.name} has no images")
        return Image.fromarray(pixels[0])


def open_memory(
    folder: str | Path,
    encoder: str,
    weights: str | None = None,
    data: str | None = None,
    image_size: int = 256,
    **options: Any,
) -> Memory:
    """The memory in a bank's folder, with encoder and data as for ``python -m magma_jax.retrieval``.

    ``options`` are those of ``Memory``. Raises as ``Memory``, ``open_bank``, ``open_encoder`` and ``open_documents``.
    """
    documents = None if data is None else open_documents(data, image_size=image_size)
    return Memory(open_bank(folder), open_encoder(encoder, weights), documents, image_size=image_size, **options)
