"""Lazy arrays: shape and dtype known, values read on demand."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tensor(Protocol):
    """Anything with a shape and a dtype: an array of any library, ``Deferred``, or ``jax.ShapeDtypeStruct``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Deferred:
    """Lazy array: shape and dtype are known, ``read()`` loads the values.

    Readers return these, the key map transforms them, and writers read them one at a time, so that a checkpoint may be
    larger than memory. The same object under two names is one tied tensor.

    Attributes:
        shape: shape of the array.
        dtype: NumPy dtype, ml_dtypes included.
        read: loads the array.
        rows: the layers of a stack, readable one at a time; empty for other arrays.
        position: file and byte offset, if it comes from a file; reading in this order is sequential.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: tuple["Deferred", ...] = ()
    position: tuple[str, int] = ("", 0)


def read_array(tensor: Any) -> np.ndarray:
    """NumPy values of a lazy tensor or of an array of any library."""
    return tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)


def read_row(tensor: Any, row: int) -> np.ndarray:
    """One entry of the leading axis, read without the others where possible."""
    if rows := getattr(tensor, "rows", ()):
        return rows[row].read()
    return read_array(tensor)[row] if hasattr(tensor, "read") else np.asarray(tensor[row])


def elements_ahead(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yields the bytes of every tensor, in order; the next tensor is read ahead while one is being written.

    Args:
        tensors: arrays, or anything with ``shape``, ``dtype`` and ``read()``.

    Raises:
        ValueError: the array read differs from the tensor's shape or dtype.
    """
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(max_workers=1) as reader:
        for tensor in tensors:
            waiting.append(reader.submit(_elements, tensor))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for elements in waiting:
            yield elements.result()


def _elements(tensor: Tensor) -> np.ndarray:
    array = read_array(tensor)
    if array.shape != tuple(tensor.shape) or array.dtype != tensor.dtype:
        announced = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"a tensor announced as {announced} was read as {array.shape} {array.dtype}")
    # As bytes: Python's buffer protocol does not support bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def alias_key(tensor: object) -> object:
    """Key that is equal for two tensors known to be the same bytes without reading them."""
    return getattr(tensor, "alias_key", id(tensor))
