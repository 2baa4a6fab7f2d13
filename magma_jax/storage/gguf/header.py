"""The header of a GGUF file: metadata, and name, shape, type and place of every tensor.

The format (version 2 or 3, little endian): magic, version, number of tensors, number of metadata entries; the entries,
each a key, a type and a value; one record per tensor; padding; the tensors' bytes. The ``gguf`` package reads it too,
but trusts the counts in the file: an array that claims 2**60 values makes it append to a list until memory is full.
Here no count is believed before the bytes that it needs are known to be there.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from magma_jax.foreign import shown
from magma_jax.storage.byte_file import ByteFile, WeightFileError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
# The largest published vocabularies take 20 MB.
_MAX_HEADER_NBYTES = 128 * 2**20
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One tensor of a file.

    Attributes:
        name: name of the tensor.
        shape: shape, slowest axis first (the file has it the other way).
        type: number of its element type.
        start: offset of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


def read_header(file: ByteFile) -> tuple[dict[str, Any], list[TensorRecord]]:
    """Metadata and tensors of a file; numbers in arrays are a NumPy array, texts in arrays a list.

    Raises:
        WeightFileError: no GGUF file, an unknown version, a header that is cut short or contradicts itself.
    """
    header = _Header(file)
    if file[:4] != MAGIC:
        raise WeightFileError(f"{file.path}: is no GGUF file; it begins with {shown(file[:4])}")
    header.skip(4)
    version = header.number("<u4")
    if version not in _VERSIONS:
        raise WeightFileError(f"{file.path}: GGUF version {version} is none of {', '.join(map(str, _VERSIONS))}")
    tensors, entries = header.number("<u8"), header.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(header.bounded(entries, 13, "metadata entries")):
        key = header.text()
        if key in metadata:
            raise WeightFileError(f"{file.path}: has the metadata {shown(key)} twice; fetch it again")
        metadata[key] = header.value(header.number("<u4"))
    records = [_record(header) for _ in range(header.bounded(tensors, 24, "tensors"))]
    alignment = metadata.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
        raise WeightFileError(f"{file.path}: {_ALIGNMENT} {shown(alignment)} is no power of two; fetch it again")
    if len({record.name for record in records}) < len(records):
        raise WeightFileError(f"{file.path}: has two tensors of one name; fetch it again")
    begin = -(-header.place // alignment) * alignment
    return metadata, [dataclasses.replace(record, start=begin + record.start) for record in records]


def _record(header: "_Header") -> TensorRecord:
    name = header.text()
    axes = header.number("<u4")
    if axes > _MAX_AXES:
        raise WeightFileError(f"{header.file.path}: {shown(name)} has {axes} axes, more than {_MAX_AXES}")
    shape = tuple(header.number("<u8") for _ in range(axes))[::-1]
    if math.prod(shape) >= 2**63:
        raise WeightFileError(f"{header.file.path}: {shown(name)} claims the shape {shape}; fetch it again")
    return TensorRecord(name, shape, header.number("<u4"), header.number("<u8"))


class _Header:
    """Reads a file from the start; every read is checked against its end."""

    def __init__(self, file: ByteFile):
        self.file, self.place = file, 0
        # Read as a whole: a vocabulary is a hundred thousand short texts.
        self._content = file[:_MAX_HEADER_NBYTES]

    def skip(self, nbytes: int) -> bytes:
        end = self.place + nbytes
        if end > len(self._content):
            size = f"{len(self.file)} bytes" if end > len(self.file) else f"a header of {_MAX_HEADER_NBYTES} bytes"
            raise WeightFileError(
                f"{self.file.path}: cut short, or not what it claims to be: byte {self.place} asks for {nbytes} more, "
                f"past {size}; fetch it again"
            )
        found, self.place = self._content[self.place : end], end
        return found

    def bounded(self, count: int, nbytes: int, what: str) -> int:
        """``count``, if as many things of at least ``nbytes`` each may follow."""
        if count * nbytes > len(self._content) - self.place:
            raise WeightFileError(f"{self.file.path}: claims {count} {what}, more than fit in the file; fetch it again")
        return count

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.skip(np.dtype(dtype).itemsize), dtype)[0].item()

    def text(self) -> str:
        place, content = self.place, self.skip(self.number("<u8"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise WeightFileError(f"{self.file.path}: the text at byte {place} is not UTF-8; fetch it again") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise WeightFileError(f"{self.file.path}: unknown type {kind} of metadata at byte {self.place}")
        inner, count = self.number("<u4"), self.number("<u8")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.skip(count * dtype.itemsize), dtype)
        if inner != _STRING:
            raise WeightFileError(f"{self.file.path}: arrays of type {inner} in metadata are not offered")
        return [self.text() for _ in range(self.bounded(count, 8, "texts in an array"))]
