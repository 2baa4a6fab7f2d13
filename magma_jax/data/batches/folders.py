"""Training batches from dataset folders: mixed, shuffled, with images, and resumable to the exact sample.

Texts are drawn, encoded and formed into batches by Grain in this process (``data.batches.batching``); their images
are decoded by other processes while the batches before them are trained on (``data.batches.stored_images``). Batches
depend on seed and folders alone, not on the number of processes.

A sample that cannot be used keeps its place, with a black image and without a loss: nothing else moves, and the mean
over the tokens of a batch goes over those that are left. It is counted, and too many are an error.
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

# Batches whose images are decoded while one is trained on.
AHEAD = 3
# The share of skipped samples is judged over at least so many.
JUDGED_SAMPLES = 1000

# Sample to ``tokens``, ``labels`` and scalars.
Encode = Callable[[Sample], dict[str, Any]]


def drawn_samples(source: FolderSamples, encode: Encode, seed: int, blank: dict[str, Any]) -> grain.MapDataset:
    """The samples of a folder, shuffled anew each time they are used up, with caption, answer and crop drawn anew.

    Args:
        source: the folder.
        encode: called with each sample.
        seed: of order and draws.
        blank: what ``encode`` would give for a sample without a loss; takes the place of an unusable one.
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
        texts: batches with ``image_rows``, ``draws`` and ``problems`` as ``drawn_samples`` gives them.
        images: their images.
        max_skipped: share of samples that may be left out.
    """

    def __init__(self, texts: grain.IterDataset, images: StoredImages, max_skipped: float):
        self._texts, self._images, self._max_skipped = texts, images, max_skipped

    def __iter__(self) -> "FolderIterator":
        return FolderIterator(iter(self._texts), self._images, self._max_skipped)


class FolderIterator:
    """Batches with ``images`` (uint8) beside ``image_rows`` (-1 where one is black for want of it), decoded ahead.

    Attributes:
        skipped: samples that were left out so far, former parts of the run included.
        just_skipped: those of the batch returned last: ``folder``, ``row``, ``reason``.
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
            DataError: more samples than ``max_skipped`` allows were left out, or a worker process died.
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
        """Position behind the batch returned last, plain JSON values."""
        return {"texts": self._position, "seen": self._seen, "skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch that ``state`` was taken at."""
        self._forget()
        self._texts.set_state(state["texts"])
        self._position, self._seen, self.skipped = state["texts"], state["seen"], state["skipped"]

    def close(self) -> None:
        """Ends the processes that decode."""
        self._forget()
        self._texts.close()
        self._images.close()

    def _forget(self) -> None:
        while self._ahead:
            self._ahead.popleft()[2].result()


def fill_images(batch: Batch, images: StoredImages) -> tuple[Batch, list[dict[str, Any]]]:
    """Adds ``images`` to a batch, without augmentation; what cannot be decoded loses its labels.

    Returns the batch, and for each sample that was left out ``folder``, ``row`` and ``reason``.
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
    """Which places for an image a sample has: all, but for those that packing leaves empty."""
    if "segments" not in batch:
        return np.ones(batch["image_rows"].shape, bool)
    return np.arange(batch["image_rows"].shape[1]) < batch["segments"].max(axis=1, keepdims=True)


def _rows(batch: Batch) -> Int[np.ndarray, " N"]:
    """Numbers of the images of a batch, -1 where there is none to decode."""
    wanted = _used(batch) & (batch.get("problems", 0) == 0)
    return np.where(wanted, batch["image_rows"], -1).ravel()
