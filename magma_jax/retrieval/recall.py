"""How well an encoder knows which text belongs to which image."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from magma_jax.data.format.records import DataError
from magma_jax.retrieval.encoders import Encoder
from magma_jax.retrieval.sources import Documents

# Documents whose pixels are in memory at a time.
BATCH = 256


class PairRecall(NamedTuple):
    """Shares of texts whose own image is among the best ``k`` of all images, and of images whose own text is.

    Of equal scores, half are assumed to be better. ``pairs`` is the number of both.
    """

    by_text: float
    by_image: float
    pairs: int


def pair_recall(documents: Documents, encoder: Encoder, k: int, splits: Collection[str]) -> PairRecall:
    """Recall among the documents of some splits.

    Raises:
        DataError: no such documents, or none with images. ValueError: a ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rows = [row for row, entry in enumerate(documents.entries) if entry.split in splits]
    if not rows:
        raise DataError(f"{documents.name} has no documents of {', '.join(sorted(splits))}")
    texts = encoder.texts([documents.entries[row].text for row in rows])
    images = []
    for start in range(0, len(rows), BATCH):
        pixels = documents.pixels(rows[start : start + BATCH], encoder.image_size)
        if pixels is None:
            raise DataError(f"{documents.name} has no images")
        images.append(encoder.images(pixels))
    scores = texts @ np.concatenate(images).T
    return PairRecall(_share(scores, k), _share(scores.T, k), len(rows))


def _share(scores: np.ndarray, k: int) -> float:
    own = np.diag(scores)[:, None]
    better = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return float((better < k).mean())
