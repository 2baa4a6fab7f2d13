"""Element types of PyTorch checkpoints, and lazy tensors whose bytes are in the file."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from magma_jax.storage.byte_file import ByteFile

# NumPy's limit.
MAX_AXES = 64
# PyTorch's dtype name -> NumPy dtype.
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
# Older typed storages, still written for all types that precede PyTorch 2.1.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


@dataclass(eq=False)
class Storage:
    """``numel`` contiguous elements in a file; ``file`` and ``start`` (bytes) are set once located."""

    key: str
    dtype: np.dtype
    numel: int
    file: ByteFile | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes according to the pickle."""
        return self.numel * self.dtype.itemsize


class LazyTensor:
    """Lazy tensor of an open checkpoint: known shape and dtype, bytes in the file.

    ``storage_key`` names its storage; tensors with equal ``alias_key`` view the same elements.
    """

    def __init__(self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple):
        self.shape, self.dtype = shape, dtype
        # Offset and strides are in elements, as in PyTorch.
        self._storage, self._offset, self._strides = storage, offset, strides

    @property
    def storage_key(self) -> str:
        """Name of the storage in the file."""
        return self._storage.key

    @property
    def alias_key(self) -> tuple:
        """Hashable key, equal for tensors that view the same elements of the same open file."""
        return self._storage, self._offset, self.shape, self._strides, self.dtype

    @property
    def position(self) -> tuple[str, int]:
        """File and byte offset of the first element; reading in this order is sequential."""
        file = self._storage.file
        return str(file.path) if file else "", self._storage.start + self._offset * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads a copy of the values; it is read-only, since an expanded tensor repeats its elements.

        Raises ValueError if the file is closed, WeightFileError if it was truncated.
        """
        storage, size = self._storage, self.dtype.itemsize
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if storage.file is None:
            raise ValueError("this tensor's storage was never located in a file")
        # Span from the first to the last element: the whole storage unless the tensor is a view.
        extent = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self._strides, strict=True))
        content = storage.file.read(storage.start + self._offset * size, extent * size)
        array = np.ndarray(self.shape, self.dtype, content, strides=[s * size for s in self._strides])
        array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype})"


def contiguous(file: ByteFile, key: str, dtype: np.dtype, shape: tuple[int, ...], start: int) -> LazyTensor:
    """Contiguous tensor at byte ``start`` of ``file``."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return LazyTensor(Storage(key, dtype, math.prod(shape), file, start), dtype, 0, shape, strides)
