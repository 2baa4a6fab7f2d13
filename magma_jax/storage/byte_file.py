"""Random access to a file's bytes without mmap, whose pages would count as the process's memory."""

import os
from pathlib import Path

import numpy as np

from magma_jax.foreign import ForeignError, open_regular


class WeightFileError(ValueError):
    """Weight file that cannot be read; one line with the file, the reason and the remedy."""


class ByteFile:
    """File open for random access; thread-safe.

    ``file[start:stop]`` returns bytes up to the end of the file; ``len(file)`` is the size when it was opened.

    Raises:
        WeightFileError: not a regular file. OSError: no such file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._descriptor: int | None = None
        try:
            self._descriptor = open_regular(self.path)
        except ForeignError as error:
            raise WeightFileError(f"{self.path}: {error}") from None
        self._nbytes = os.fstat(self._descriptor).st_size

    def __len__(self) -> int:
        return self._nbytes

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._nbytes)
        return self.read(start, max(0, stop - start)).tobytes()

    def read(self, start: int, nbytes: int) -> np.ndarray:
        """Reads ``nbytes`` bytes from offset ``start`` into a new uint8 array.

        Raises:
            ValueError: the file is closed. WeightFileError: the file was truncated.
        """
        if self._descriptor is None:
            raise ValueError("this tensor's checkpoint was closed: read it inside the `with` block")
        content = np.empty(nbytes, np.uint8)
        done = 0
        while done < nbytes:  # Linux reads at most 2 GiB at once
            count = os.preadv(self._descriptor, [content[done:].data], start + done)
            if not count:
                raise WeightFileError(f"{self.path}: became shorter while it was read; fetch it again")
            done += count
        return content

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
