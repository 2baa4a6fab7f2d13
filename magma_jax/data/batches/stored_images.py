"""Images of dataset folders as an encoder wants them, decoded by worker processes ahead of time.

Workers write pixels into memory that they share with this process, so that an image is copied once and never
pickled. What is wrong with an image comes back as a few words in place of its pixels.
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
from magma_jax.typing import Int, UInt8

Decode = Literal["exact", "fast"]
Augment = Literal["none", "random_crop"]

DAMAGED_RECORD = "record damaged"
# With 1.0 images of 1024 x 768 would be halved too for 384 pixels, and differ by 3.4 on average; with 2.0 those of
# 1600 x 1200 would not, which saves 40 % of their time.
FAST_MARGIN = 1.5
# Images that a worker is given at a time.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What becomes of an image's bytes.

    Attributes:
        size: pixels per side.
        decode: ``exact``, pixels as the original's; ``fast``, a large JPEG is decoded at a half, a quarter or an eighth
            of its size, if no side then falls below ``FAST_MARGIN`` times ``size``. Of photographs the pixels then
            differ by less than 2 of 255 on average, and one in a hundred by more than 5.
        augment: ``none``, or ``random_crop`` for images that are learned from.
    """

    size: int
    decode: Decode = "exact"
    augment: Augment = "none"


class StoredImages:
    """The images of several dataset folders, numbered through in their order.

    ``images[rows]`` gives uint8 (..., size, size, 3) as for evaluation, without augmentation.

    Args:
        folders: dataset folders.
        options: how images are decoded.
        workers: processes that decode; 0 for none but this one. They start with the first images.
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
        """Whether an image always has the same pixels."""
        return self._options.augment == "none"

    @property
    def records(self) -> list[StoredRecords]:
        """The records of every folder."""
        return self._reader.records

    def first_row(self, folder: str) -> int:
        """Number of the first image of a folder."""
        return int(self._reader.starts[self.folders.index(folder)])

    def where(self, row: int) -> tuple[str, int]:
        """Folder of an image, and its row there."""
        number, local = self._reader.locate(row)
        return self.folders[number], local

    def __getitem__(self, rows: Any) -> UInt8[np.ndarray, "... H W 3"]:
        """Images of a row, rows or a slice.

        Raises:
            DataError: an image that cannot be decoded, with its folder and row.
        """
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        pixels, problems = self.load(rows.ravel()).result()
        for place, problem in problems.items():
            folder, row = self.where(int(rows.ravel()[place]))
            raise DataError(f"{folder}: {problem} (row {row}); repair the image and convert it again")
        return pixels.reshape(*rows.shape, *pixels.shape[1:])

    def load(self, rows: Int[np.ndarray, " N"], draws: Int[np.ndarray, " N"] | None = None) -> "Pending":
        """Begins to decode images; a row of -1 gives a black one.

        Args:
            rows: numbers of the images.
            draws: random seed of each one's augmentation; None for no augmentation.
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
        """Process ids of the workers that have started."""
        return [] if self._pool is None else list(self._pool._processes)

    def close(self) -> None:
        """Ends the workers; they start again when images are asked for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._blocks.close()


@dataclasses.dataclass
class Pending:
    """Images on their way."""

    _pixels: UInt8[np.ndarray, "N H W 3"] | None
    _release: Any
    _tasks: list[concurrent.futures.Future]

    def result(self) -> tuple[UInt8[np.ndarray, "N H W 3"], dict[int, str]]:
        """Waits for the images; a place that has a problem is black, and the problem is named.

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
        assert self._pixels is not None  # asked for once
        if self._release is None:
            return self._pixels, problems
        pixels = self._pixels.copy()
        self._pixels = None
        self._release()
        return pixels, problems


class _Reader:
    """Folders opened in one process."""

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
        """Writes images to ``pixels[first:]``; returns what is wrong, by place."""
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
        except (DataError, OSError, ValueError, RuntimeError):  # the last two from the file library
            return DAMAGED_RECORD
        return None


class _Blocks:
    """Shared memory, used again and again."""

    def __init__(self):
        self._free: list[SharedMemory] = []
        self._all: list[SharedMemory] = []

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
        for block in self._all:
            block.unlink()
        self._free.clear()
        self._all.clear()


# Of a worker process: its folders, and the memory it has seen.
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
    assert _reader is not None  # of _start_worker
    return _reader.fill(np.ndarray(shape, np.uint8, _seen[name].buf), first, rows, draws)
