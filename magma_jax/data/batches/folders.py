"""Training batches from dataset folders: mixed, shuffled, with images, and resumable to the exact sample.

Grain samples, encodes and batches the texts in this process (``data.batches.batching``); other processes decode the
images ahead of time (``data.batches.stored_images``). Batches depend only on seed and folders, not on the number of
processes.

An unusable sample keeps its place, with a black image and no loss: the order does not change, and the loss is averaged
over the remaining tokens of the batch. Such samples are counted, and too many raise an error.
"""

import collections
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from magma_jax.data.batches.batching import Batch
from magma_jax.data.batches.sources import UNUSABLE, FolderSamples, UnusableSample
from magma_jax.data.batches.stored_images import Pending, StoredImages
from magma_jax.data.format.records import DataError, Sample
from magma_jax.typing import IGNORED, Int

# Batches whose images are decoded ahead.
AHEAD = 3
# Minimum number of samples for the check of the skipped fraction.
JUDGED_SAMPLES = 1000

# Sample to ``tokens``, ``labels`` and scalars.
Encode = Callable[[Sample], dict[str, Any]]


def drawn_samples(source: FolderSamples, encode: Encode, seed: int, blank: dict[str, Any]) -> grain.MapDataset:
    """Endless samples of a folder; every epoch has a new order and new random captions, answers and crops.

    Args:
        source: the folder.
        encode: called with each sample.
        seed: random seed of order and choices.
        blank: encoded sample without a loss, which replaces unusable ones.
    """

    def encoded(index: int, number: int) -> dict[str, Any]:
        rng = np.random.default_rng((seed, index))
        problem = 0
        try:
            sample = encode(source.draw(number, rng))
        except UnusableSample as error:
            sample = blank | {"image_rows": np.int32(source.image(number))}
            problem = 1 + UNUSABLE.index(str(error))
        return sample | {"draws": rng.integers(2**62), "problems": np.int32(problem)}

    return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().map_with_index(encoded)


class FolderBatches:
    """Endless batches; an iterable whose iterator is a ``FolderIterator``.

    Args:
        texts: batches with ``image_rows``, ``draws`` and ``problems`` from ``drawn_samples``.
        images: their images.
        max_skipped: largest fraction of skipped samples.
    """

    def __init__(self, texts: grain.IterDataset, images: StoredImages, max_skipped: float):
        self._texts, self._images, self._max_skipped = texts, images, max_skipped

    def __iter__(self) -> "FolderIterator":
        return FolderIterator(iter(self._texts), self._images, self._max_skipped)


class FolderIterator:
    """Batches with ``images`` (uint8), decoded ahead, and ``image_rows`` (-1 for a missing image, which is black).

    Attributes:
        skipped: number of samples skipped so far, earlier parts of a resumed run included.
        just_skipped: skipped samples of the last batch: ``folder``, ``row``, ``reason``.
    """

    def __init__(self, texts: grain.DatasetIterator, images: StoredImages, max_skipped: float):
        self._texts, self._images, self._max_skipped = texts, images, max_skipped
        self._ahead: collections.deque[tuple[Batch, dict[str, Any], Pending]] = collections.deque()
        self._position = texts.get_state()
        self._seen = self.skipped = 0
        self.just_skipped: list[dict[str, Any]] = []

    def __iter__(self) -> "FolderIterator":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: more samples were skipped than ``max_skipped`` allows, or a worker process died.
        """
        while len(self._ahead) < AHEAD:
            batch = next(self._texts)
            pending = self._images.load(_rows(batch), batch["draws"].ravel())
            self._ahead.append((batch, self._texts.get_state(), pending))
        batch, self._position, pending = self._ahead.popleft()
        self._seen += int(_used(batch).sum())
        batch, self.just_skipped = _with_images(batch, pending, self._images)
        self.skipped += len(self.just_skipped)
        if self.skipped > self._max_skipped * max(self._seen, JUDGED_SAMPLES):
            counted = collections.Counter(f"{entry['reason']} in {entry['folder']}" for entry in self.just_skipped)
            raise DataError(
                f"{self.skipped} of {self._seen} samples could not be used, more than data.max_skipped "
                f"{self._max_skipped:.2%} (the last ones: {', '.join(counted)}); repair and convert again, or raise it"
            )
        return batch

    def get_state(self) -> dict[str, Any]:
        """Position after the last returned batch, as plain JSON values."""
        return {"texts": self._position, "seen": self._seen, "skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which ``get_state`` returned ``state``."""
        self._forget()
        self._texts.set_state(state["texts"])
        self._position, self._seen, self.skipped = state["texts"], state["seen"], state["skipped"]

    def close(self) -> None:
        """Ends the decoding processes."""
        self._forget()
        self._texts.close()
        self._images.close()

    def _forget(self) -> None:
        while self._ahead:
            self._ahead.popleft()[2].result()


def fill_images(batch: Batch, images: StoredImages) -> tuple[Batch, list[dict[str, Any]]]:
    """Adds ``images`` to a batch, without augmentation; samples with undecodable images lose their labels.

    Returns the batch, and ``folder``, ``row`` and ``reason`` of each skipped sample.
    """
    return _with_images(batch, images.load(_rows(batch)), images)


def _with_images(batch: Batch, pending: Pending, stored: StoredImages) -> tuple[Batch, list[dict[str, Any]]]:
    shape = batch["image_rows"].shape
    codes = batch.get("problems", np.zeros(shape, np.int32)).ravel()
    pixels, found = pending.result()
    problems = {int(place): UNUSABLE[codes[place] - 1] for place in np.flatnonzero(codes)} | found
    labels = batch["labels"].copy()
    skipped = []
    for place, reason in sorted(problems.items()):
        row, *slot = np.unravel_index(place, shape)
        lost = batch["segments"][row] == slot[0] + 1 if slot else slice(None)
        labels[row, lost] = IGNORED
        folder, local = stored.where(int(batch["image_rows"].ravel()[place]))
        skipped.append({"folder": folder, "row": local, "reason": reason})
    kept = {name: array for name, array in batch.items() if name not in ("draws", "problems")}
    shown = _rows(batch)
    shown[list(found)] = -1
    images = pixels.reshape(*shape, *pixels.shape[1:])
    return kept | {"labels": labels, "images": images, "image_rows": shown.reshape(shape)}, skipped


def _used(batch: Batch) -> np.ndarray:
    """Mask of image places in use; packing leaves some empty."""
    if "segments" not in batch:
        return np.ones(batch["image_rows"].shape, bool)
    return np.arange(batch["image_rows"].shape[1]) < batch["segments"].max(axis=1, keepdims=True)


def _rows(batch: Batch) -> Int[np.ndarray, " N"]:
    """Image numbers of a batch, -1 for places without an image to decode."""
    wanted = _used(batch) & (batch.get("problems", 0) == 0)
    return np.where(wanted, batch["image_rows"], -1).ravel()
