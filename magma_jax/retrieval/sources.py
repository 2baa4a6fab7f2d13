"""Documents of data sets: ids, texts, pixels, and codes where there are any."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from magma_jax.data.documents.bank import Entry
from magma_jax.data.format.code_folder import StoredCodes, code_dtype
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError
from magma_jax.data.images import ImageInput
from magma_jax.data.openmoji import drawings
from magma_jax.typing import UInt8

OPENMOJI = "openmoji"


class Documents(Protocol):
    """Documents of a data set.

    Attributes:
        name: name of the data set.
        entries: id, text and split of every document.
    """

    name: str
    entries: Sequence[Entry]

    def pixels(self, rows: Sequence[int], size: int) -> UInt8[np.ndarray, "N size size 3"] | None:
        """Images of documents; None if the data set has none."""
        ...

    def codes(self, rows: Sequence[int]) -> np.ndarray | None:
        """Codes of their images; None if the data set has none."""
        ...


class OpenmojiDocuments:
    """OpenMoji's drawings and their names."""

    name = OPENMOJI

    def __init__(self, cache_dir: str = "~/.cache/magma_jax", image_size: int = 64):
        records, self._images = drawings.load(Path(cache_dir).expanduser(), image_size)
        self._size = image_size
        self.entries: Sequence[Entry] = [Entry(id=one.codepoints, text=one.caption, split=one.split) for one in records]

    def pixels(self, rows: Sequence[int], size: int) -> UInt8[np.ndarray, "N size size 3"] | None:
        if size != self._size:
            return np.stack([ImageInput(_image(self._images[row])).pixels(size) for row in rows])
        return self._images[list(rows)]

    def codes(self, rows: Sequence[int]) -> np.ndarray | None:
        return None


class FolderDocuments:
    """Records of a dataset folder, with their first caption; records without one are left out.

    Args:
        folder: see ``data.format``.
        split: name of the split that the folder holds.
        codes: folder of the same images' codes; records without codes are left out.
    """

    def __init__(self, folder: str | Path, split: str = "train", codes: str | Path | None = None):
        self._codes = None if codes is None else StoredCodes(codes)
        coded = {} if self._codes is None else {self._codes.text(i).id: i for i in range(len(self._codes))}
        self._code_rows: list[int] = []
        self.name, self._records = str(folder), StoredRecords(folder)
        self._rows: list[int] = []
        found: list[Entry] = []
        for row in range(len(self._records)):
            record = self._records.text(row)
            if record.captions and (self._codes is None or record.id in coded):
                self._rows.append(row)
                self._code_rows.append(coded.get(record.id, -1))
                found.append(Entry(id=record.id, text=record.captions[0], split=split))
        self.entries: Sequence[Entry] = found
        if not found:
            raise DataError(f"{folder}: has no captions to retrieve by")

    def pixels(self, rows: Sequence[int], size: int) -> UInt8[np.ndarray, "N size size 3"] | None:
        return np.stack([ImageInput(self._records[self._rows[row]].image_bytes()).pixels(size) for row in rows])

    def codes(self, rows: Sequence[int]) -> np.ndarray | None:
        if self._codes is None:
            return None
        found = np.stack([self._codes[self._code_rows[row]][0] for row in rows])
        return found.astype(code_dtype(self._codes.size))


def open_documents(
    data: str,
    split: str = "train",
    codes: str | None = None,
    cache_dir: str = "~/.cache/magma_jax",
    image_size: int = 64,
) -> Documents:
    """Documents of ``openmoji``, whose drawings have splits of their own, or of a dataset folder with one ``split``.

    Drawings of ``openmoji`` are drawn with ``image_size`` pixels per side; at another size they are resized.

    Raises:
        DataError: no such folder.
    """
    if data != OPENMOJI:
        return FolderDocuments(data, split, codes)
    if codes is not None:
        raise ValueError("--codes: drawings of openmoji are encoded by the model that learns from them; leave it out")
    return OpenmojiDocuments(cache_dir, image_size)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)
