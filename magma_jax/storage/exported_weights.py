"""Parameters of an exported folder: one safetensors file with the library's own paths as names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.storage.deferred import Deferred
from magma_jax.storage.safetensors_file import open_safetensors
from magma_jax.typing import Params

EXPORTED_FILE = "model.safetensors"


def open_exported(folder: Path) -> dict[str, Deferred]:
    """Lazy parameters of an exported folder, by path; the layers of a stack can be read one at a time.

    Raises:
        WeightFileError: not a complete safetensors file.
    """
    _, tensors, _ = open_safetensors(folder / EXPORTED_FILE)  # lazy tensors keep the file open
    return {name: _deferred(tensor) for name, tensor in tensors.items()}


def read_exported(stored: Mapping[str, Deferred], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads arrays into the dtypes and shardings of ``wanted``, one at a time."""
    return {path: _placed(stored[path], leaf) for path, leaf in wanted.items()}


def _deferred(tensor: Any) -> Deferred:
    return Deferred(tuple(tensor.shape), np.dtype(tensor.dtype), tensor.read)


def _placed(tensor: Deferred, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    array = tensor.read()
    sharding: Any = leaf.sharding  # ``with_sharding`` has filled it in
    # Every process reads the file and keeps its own part.
    return jax.make_array_from_callback(
        tuple(leaf.shape), sharding, lambda index: np.asarray(array[index], dtype=leaf.dtype)
    )
