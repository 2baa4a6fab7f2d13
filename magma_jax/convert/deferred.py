"""An array that is promised but not yet in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Deferred:
    """Shape and dtype now, the values when ``read()`` is called.

    Readers give these, the key map turns them into others, and writers call ``read`` for one at a time, so a
    checkpoint larger than memory passes through. The same object in two places is one tensor with two names.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_array(tensor: object) -> np.ndarray:
    """The values of anything with ``read()`` (a promised tensor), or of a plain array of any library."""
    return tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)


def alias_key(tensor: object) -> object:
    """Equal for two tensors exactly when both are known to be the same bytes, without reading them."""
    return getattr(tensor, "alias_key", id(tensor))
