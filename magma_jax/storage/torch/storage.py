"""What a PyTorch checkpoint calls its element types, and tensors whose bytes are still in the file."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from magma_jax.storage.byte_file import ByteFile

# NumPy's limit.
MAX_AXES = 64
# PyTorch's dtype name -> ours.
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
# The older way to say the same, still used for all types that are older than PyTorch 2.1.
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
    """A run of ``numel`` elements in a file; ``file`` and ``start`` (bytes) are set once located."""

    key: str
    dtype: np.dtype
    numel: int
    file: ByteFile | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes that the pickle claims."""
        return self.numel * self.dtype.itemsize


class LazyTensor:
    """A tensor of an open checkpoint: known shape and dtype, bytes still in the file.

    ``storage_key`` names the storage it lies in; two tensors with equal ``alias_key`` are the same elements.
    """

    def __init__(self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple):
        self.shape, self.dtype = shape, dtype
        # Offset and strides count elements, as in PyTorch.
        self._storage, self._offset, self._strides = storage, offset, strides

    @property
    def storage_key(self) -> str:
        """The file's name of the storage."""
        return self._storage.key

    @property
    def alias_key(self) -> tuple:
        """Hashable; equal exactly for tensors over the same elements of the same open file."""
        return self._storage, self._offset, self.shape, self._strides, self.dtype

    @property
    def position(self) -> tuple[str, int]:
        """File and byte at which the tensor begins: reading in this order reads a file from front to back."""
        file = self._storage.file
        return str(file.path) if file else "", self._storage.start + self._offset * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, in memory of their own; read-only, since an expanded tensor repeats its elements.

        Raises ValueError if the file was closed, WeightFileError if it became shorter.
        """
        storage, size = self._storage, self.dtype.itemsize
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if storage.file is None:
            raise ValueError("this tensor's storage was never located in a file")
        # From the first element to the last, which is all of it unless the tensor is a view.
        extent = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self._strides, strict=True))
        content = storage.file.read(storage.start + self._offset * size, extent * size)
        array = np.ndarray(self.shape, self.dtype, content, strides=[s * size for s in self._strides])
        array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype})"


def contiguous(file: ByteFile, key: str, dtype: np.dtype, shape: tuple[int, ...], start: int) -> LazyTensor:
    """A tensor that lies in row-major order from byte ``start`` of ``file`` on."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return LazyTensor(Storage(key, dtype, math.prod(shape), file, start), dtype, 0, shape, strides)
