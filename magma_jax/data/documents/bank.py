"""Memory banks: documents that may be retrieved, with a vector each.

A folder that ``python -m magma_jax.retrieval build`` writes:

    bank.json     encoder, numbers, splits of the documents
    vectors.npy   float16 (N, D), memory-mapped
    texts.jsonl   one line per document: {"id": ..., "text": ..., "split": ..., "fields": ...}
    codes.npy     (N, T) image codes, memory-mapped; missing if the bank was built from images alone
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magma_jax.data.format.records import DataError
from magma_jax.foreign import ForeignError, read_json

BANK_FILE, VECTORS_FILE, TEXTS_FILE, CODES_FILE = "bank.json", "vectors.npy", "texts.jsonl", "codes.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A document.

    Attributes:
        id: unique in its data set.
        text: its text.
        split: the split that it is from.
        fields: further texts by name, for templates.
    """

    id: str
    text: str
    split: str
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryBank:
    """An open bank.

    Attributes:
        folder: where it is.
        about: contents of ``bank.json``.
        vectors: float16 (N, D); inner products are scores.
        codes: (N, T), or None.
    """

    folder: Path
    about: Mapping[str, Any]
    vectors: np.ndarray
    codes: np.ndarray | None

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def encoder(self) -> str:
        """Name of the encoder that made the vectors."""
        return str(self.about["encoder"])

    @functools.cached_property
    def entries(self) -> Sequence[Entry]:
        """Ids, texts and splits of all documents."""
        try:
            lines = (self.folder / TEXTS_FILE).read_text(encoding="utf-8").splitlines()
            found = [Entry(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.folder / TEXTS_FILE}: cannot be read ({error}); build the bank again") from None
        if len(found) != len(self):
            raise DataError(f"{self.folder}: has {len(found)} texts, but {len(self)} vectors; build the bank again")
        return found

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """Row of every document by its id."""
        return {entry.id: row for row, entry in enumerate(self.entries)}


def open_bank(folder: str | Path) -> MemoryBank:
    """Opens a bank.

    Raises:
        DataError: no bank, or one that is not complete or damaged.
    """
    folder = Path(folder).expanduser()
    try:
        about = read_json(folder / BANK_FILE)
        vectors = np.load(folder / VECTORS_FILE, mmap_mode="r")
        codes = np.load(folder / CODES_FILE, mmap_mode="r") if (folder / CODES_FILE).exists() else None
        str(about["encoder"])
    except (OSError, ForeignError, ValueError, KeyError, TypeError) as error:
        if not (folder / BANK_FILE).exists():
            raise DataError(
                f"{folder}: no memory bank; write one with python -m magma_jax.retrieval build, or finish that"
            ) from None
        raise DataError(f"{folder}: the bank cannot be read ({error}); build it again") from None
    if vectors.ndim != 2 or (codes is not None and len(codes) != len(vectors)):
        raise DataError(f"{folder}: vectors and codes do not fit each other; build the bank again")
    return MemoryBank(folder, about, vectors, codes)
