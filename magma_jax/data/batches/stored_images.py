"""Encoder inputs from the images of dataset folders, decoded ahead of time by worker processes.

Workers write pixels to shared memory, so that an image is copied once and never pickled. For an unusable image they
return a short reason.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Literal

import numpy as np

from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError
from magma_jax.data.images import ImageError, load_image, random_crop, to_square
from magma_jax.data.pillow_steps import keep_freed_memory
from magma_jax.data.time_limit import TimeLimit
from magma_jax.data.workers import finished, worker_pool
from magma_jax.runtime.ending import give_back_at_end
from magma_jax.typing import Int, UInt8

Decode = Literal["exact", "fast"]
Augment = Literal["none", "random_crop"]

DAMAGED_RECORD = "record damaged"
# For 384 pixels, 1.0 would also halve images of 1024 x 768, with a mean difference of 3.4; 2.0 would not halve those of
# 1600 x 1200, which saves 40 % of their time.
FAST_MARGIN = 1.5
# Images per task of a worker.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Options of image decoding.

    Attributes:
        size: pixels per side.
        decode: ``exact`` gives the original's pixels; ``fast`` decodes a large JPEG at a half, a quarter or an eighth
            of its size, if no side falls below ``FAST_MARGIN`` times ``size``. Pixels of photographs then differ by
            less than 2 of 255 on average, and one in a hundred by more than 5.
        augment: ``none``, or ``random_crop`` for training images.
    """

    size: int
    decode: Decode = "exact"
    augment: Augment = "none"


class StoredImages:
    """Images of several dataset folders, numbered consecutively in folder order.

    ``images[rows]`` is uint8 (..., size, size, 3) without augmentation, as for evaluation.

    Args:
        folders: dataset folders.
        options: how images are decoded.
        workers: number of decoding processes, started on first use; 0 to decode in this process.
    """

    def __init__(self, folders: Sequence[str | Path], options: ImageOptions, workers: int = 0):
        self.folders = tuple(map(str, folders))
        self._reader = _Reader(self.folders, options)
        self._options, self._workers = options, workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._blocks = _Blocks()

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def are_fixed(self) -> bool:
        """Whether images have no random augmentation."""
        return self._options.augment == "none"

    @property
    def records(self) -> list[StoredRecords]:
        """Records of each folder."""
        return self._reader.records

    def first_row(self, folder: str) -> int:
        """Number of the first image of a folder."""
        return int(self._reader.starts[self.folders.index(folder)])

    def where(self, row: int) -> tuple[str, int]:
        """Folder of an image, and its row in the folder."""
        number, local = self._reader.locate(row)
        return self.folders[number], local

    def __getitem__(self, rows: Any) -> UInt8[np.ndarray, "... H W 3"]:
        """Images of a row, rows or a slice.

        Raises:
            DataError: an image cannot be decoded; names its folder and row.
        """
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        pixels, problems = self.load(rows.ravel()).result()
        for place, problem in problems.items():
            folder, row = self.where(int(rows.ravel()[place]))
            raise DataError(f"{folder}: {problem} (row {row}); repair the image and convert it again")
        return pixels.reshape(*rows.shape, *pixels.shape[1:])

    def load(self, rows: Int[np.ndarray, " N"], draws: Int[np.ndarray, " N"] | None = None) -> "Pending":
        """Starts decoding images; row -1 gives a black image.

        Args:
            rows: image numbers.
            draws: augmentation seed of each image; None for no augmentation.
        """
        rows = np.asarray(rows)
        shape = (len(rows), self._options.size, self._options.size, 3)
        if not self._workers:
            pixels = np.zeros(shape, np.uint8)
            return Pending(pixels, None, [finished(self._reader.fill(pixels, 0, rows, draws))])
        if self._pool is None:
            keep_freed_memory()
            self._pool = worker_pool(self._workers, _start_worker, (self.folders, self._options))
        block = self._blocks.take(int(np.prod(shape)))
        chunks = [slice(start, start + CHUNK) for start in range(0, len(rows), CHUNK)]
        tasks = [
            self._pool.submit(
                _fill_block, block.name, shape, chunk.start, rows[chunk], None if draws is None else draws[chunk]
            )
            for chunk in chunks
        ]
        pixels = np.ndarray(shape, np.uint8, block.buf)
        return Pending(pixels, lambda: self._blocks.give_back(block), tasks)

    def worker_ids(self) -> list[int]:
        """Process ids of the running workers."""
        return [] if self._pool is None else list(self._pool._processes)

    def close(self) -> None:
        """Ends the workers; the next request starts them again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._blocks.close()


@dataclasses.dataclass
class Pending:
    """Images being decoded."""

    _pixels: UInt8[np.ndarray, "N H W 3"] | None
    _release: Any
    _tasks: list[concurrent.futures.Future]

    def result(self) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[int, str]]:
        """Waits for the images, (N, size, size, 3), and the problems by position; unusable images are black.

        Raises:
            DataError: a worker process died.
        """
        problems: dict[int, str] = {}
        try:
            for task in self._tasks:
                problems |= task.result()
        except BrokenProcessPool:
            raise DataError(
                "a process that decodes images died, perhaps for lack of memory; lower data.workers"
            ) from None
        assert self._pixels is not None  # result() is called once
        if self._release is None:
            return self._pixels, problems
        pixels = self._pixels.copy()
        self._pixels = None
        self._release()
        return pixels, problems


class _Reader:
    """Dataset folders opened in one process."""

    def __init__(self, folders: Sequence[str], options: ImageOptions):
        self.records = [StoredRecords(folder) for folder in folders]
        self.starts = np.cumsum([0, *map(len, self.records)])
        self._options = options

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"image {row} of {len(self)}")
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, int(row - self.starts[number])

    def fill(self, pixels: np.ndarray, first: int, rows: np.ndarray, draws: np.ndarray | None) -> dict[int, str]:
        """Writes images to ``pixels[first:]``; returns problems by position."""
        problems = {}
        for place, row in enumerate(rows.tolist(), start=first):
            draw = None if draws is None else int(draws[place - first])
            problem = None if row < 0 else self._fill_one(pixels[place], row, draw)
            if problem is not None:
                problems[place] = problem
            if row < 0 or problem is not None:
                pixels[place] = 0
        return problems

    def _fill_one(self, pixels: np.ndarray, row: int, draw: int | None) -> str | None:
        number, local = self.locate(row)
        size = self._options.size
        try:
            content = self.records[number][local].image_bytes()
            with TimeLimit(f"row {local}"):
                image = load_image(content, draft=round(FAST_MARGIN * size) if self._options.decode == "fast" else 0)
                if draw is None or self._options.augment == "none":
                    pixels[:] = np.asarray(to_square(image, size))
                else:
                    pixels[:] = random_crop(image, size, np.random.default_rng(draw))
        except ImageError as error:
            return error.kind
        except (DataError, OSError, ValueError, RuntimeError):  # the last two: the file library
            return DAMAGED_RECORD
        return None


class _Blocks:
    """Pool of reusable shared memory blocks; the system gets them back at ``close``, or when the process ends."""

    def __init__(self):
        self._free: list[SharedMemory] = []
        self._all: list[SharedMemory] = []
        give_back_at_end(self, _unlink, self._all)

    def take(self, nbytes: int) -> SharedMemory:
        for block in self._free:
            if block.size >= nbytes:
                self._free.remove(block)
                return block
        self._all.append(SharedMemory(create=True, size=max(nbytes, 1)))
        return self._all[-1]

    def give_back(self, block: SharedMemory) -> None:
        self._free.append(block)

    def close(self) -> None:
        self._free.clear()
        _unlink(self._all)


def _unlink(blocks: list[SharedMemory]) -> None:
    while blocks:
        blocks.pop().unlink()


# Globals of a worker process: its folders, and the shared memory it has attached.
_reader: _Reader | None = None
_seen: dict[str, SharedMemory] = {}


def _start_worker(folders: tuple[str, ...], options: ImageOptions) -> None:
    global _reader
    _reader = _Reader(folders, options)


def _fill_block(
    name: str, shape: tuple[int, ...], first: int, rows: np.ndarray, draws: np.ndarray | None
) -> dict[int, str]:
    if name not in _seen:
        _seen[name] = SharedMemory(name)
    assert _reader is not None  # set by _start_worker
    return _reader.fill(np.ndarray(shape, np.uint8, _seen[name].buf), first, rows, draws)
