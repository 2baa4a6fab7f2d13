"""An array that is promised but not yet in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Tensor(Protocol):
    """What has a shape and a dtype: an array of any library, one that is promised, or ``jax.ShapeDtypeStruct``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Deferred:
    """Shape and dtype now, the values when ``read()`` is called.

    Readers give these, the key map turns them into others, and writers call ``read`` for one at a time, so a
    checkpoint larger than memory passes through. The same object in two places is one tensor with two names.

    Attributes:
        shape: of the array.
        dtype: NumPy dtype, ml_dtypes included.
        read: gives the array.
        rows: of a stack of layers, every layer by itself, so that nobody needs to read the whole stack; else empty.
        position: file and byte where it begins, if it comes from a file: an order in which reading is quick.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    rows: tuple["Deferred", ...] = ()
    position: tuple[str, int] = ("", 0)


def read_array(tensor: Any) -> np.ndarray:
    """The values of anything with ``read()`` (a promised tensor), or of a plain array of any library."""
    return tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)


def read_row(tensor: Any, row: int) -> np.ndarray:
    """One entry of the leading axis, without reading the others where that is possible."""
    if rows := getattr(tensor, "rows", ()):
        return rows[row].read()
    return read_array(tensor)[row] if hasattr(tensor, "read") else np.asarray(tensor[row])


def elements_ahead(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The elements of every tensor as bytes, in order; the next one is read while one is being written.

    Args:
        tensors: arrays, or anything with ``shape``, ``dtype`` and ``read()``.

    Raises:
        ValueError: a tensor is not as announced.
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
    # As bytes, because Python's buffers do not know bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def alias_key(tensor: object) -> object:
    """Equal for two tensors exactly when both are known to be the same bytes, without reading them."""
    return getattr(tensor, "alias_key", id(tensor))
