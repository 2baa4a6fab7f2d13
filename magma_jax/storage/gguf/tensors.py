"""The tensors of a GGUF file, read one at a time; blocks of integers become fp32.

Dequantization is that of the ``gguf`` package: NumPy expressions over bytes whose number was checked here.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from magma_jax.foreign import shown
from magma_jax.storage.byte_file import ByteFile, WeightFileError
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.gguf.header import MAGIC, TensorRecord, read_header

PACKAGE = "gguf"


@dataclasses.dataclass(frozen=True)
class ElementType:
    """How elements are stored: ``block`` elements in ``nbytes`` bytes; ``dtype`` if they are plain numbers."""

    name: str
    block: int
    nbytes: int
    dtype: np.dtype | None = None


# By their number in the file. Bytes of a block: scales, then the integers.
TYPES = {
    0: ElementType("F32", 1, 4, np.dtype("<f4")),
    1: ElementType("F16", 1, 2, np.dtype("<f2")),
    30: ElementType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    2: ElementType("Q4_0", 32, 2 + 16),
    3: ElementType("Q4_1", 32, 2 + 2 + 16),
    6: ElementType("Q5_0", 32, 2 + 4 + 16),
    7: ElementType("Q5_1", 32, 2 + 2 + 4 + 16),
    8: ElementType("Q8_0", 32, 2 + 32),
    10: ElementType("Q2_K", 256, 2 + 2 + 16 + 64),
    11: ElementType("Q3_K", 256, 2 + 64 + 32 + 12),
    12: ElementType("Q4_K", 256, 2 + 2 + 128 + 12),
    13: ElementType("Q5_K", 256, 2 + 2 + 128 + 32 + 12),
    14: ElementType("Q6_K", 256, 2 + 128 + 64 + 16),
}


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a file that is named, or begins, like a GGUF file."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: str | os.PathLike) -> tuple[ByteFile, dict[str, Any], dict[str, Deferred]]:
    """Opens a file; returns it (the caller closes it), its metadata, and its tensors in the order of the file.

    Integers in blocks are announced as fp32, which ``read()`` gives.

    Raises:
        WeightFileError: a damaged file; a tensor of an unknown type, or one that does not lie inside the file; the
            ``gguf`` package is needed and missing. OSError: no such file.
    """
    file = ByteFile(path)
    try:
        metadata, records = read_header(file)
        tensors = {record.name: _tensor(file, record) for record in sorted(records, key=lambda record: record.start)}
        _check_places(file, records)
    except BaseException:
        file.close()
        raise
    return file, metadata, tensors


def _tensor(file: ByteFile, record: TensorRecord) -> Deferred:
    kind = TYPES.get(record.type)
    if kind is None:
        names = ", ".join(kind.name for kind in TYPES.values())
        raise WeightFileError(f"{file.path}: {shown(record.name)} has the element type {record.type}, none of {names}")
    if not record.shape or record.shape[-1] % kind.block:
        raise WeightFileError(
            f"{file.path}: {shown(record.name)} of shape {record.shape} is not made of {kind.name} blocks of "
            f"{kind.block}; fetch it again"
        )
    if kind.dtype is not None:
        read: Callable[[], np.ndarray] = functools.partial(_plain, file, record, kind.dtype)
        return Deferred(record.shape, kind.dtype, read, position=(str(file.path), record.start))
    dequantize = _dequantizer(kind.name)

    def values() -> np.ndarray:
        row = record.shape[-1] // kind.block * kind.nbytes
        content = file.read(record.start, _nbytes(record))
        return dequantize(content.reshape(*record.shape[:-1], row))

    return Deferred(record.shape, np.dtype(np.float32), values, position=(str(file.path), record.start))


def _plain(file: ByteFile, record: TensorRecord, dtype: np.dtype) -> np.ndarray:
    return file.read(record.start, _nbytes(record)).view(dtype).reshape(record.shape)


def _nbytes(record: TensorRecord) -> int:
    kind = TYPES[record.type]
    return math.prod(record.shape) // kind.block * kind.nbytes


def _check_places(file: ByteFile, records: list[TensorRecord]) -> None:
    end, before = 0, "the header"
    for record in sorted(records, key=lambda record: record.start):
        if record.start < end:
            raise WeightFileError(f"{file.path}: {shown(record.name)} begins inside of {shown(before)}; fetch it again")
        end, before = record.start + _nbytes(record), record.name
        if end > len(file):
            raise WeightFileError(
                f"{file.path}: cut short: {shown(record.name)} ends at byte {end} of {len(file)}; fetch it again"
            )


def _dequantizer(name: str) -> Callable[[np.ndarray], np.ndarray]:
    try:
        from gguf.constants import GGMLQuantizationType  # pyright: ignore[reportMissingImports]
        from gguf.quants import dequantize  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise WeightFileError(
            f"tensors of type {name} need the package {PACKAGE}: pip install 'magma_jax[gguf]'"
        ) from None
    return functools.partial(dequantize, qtype=GGMLQuantizationType[name])
