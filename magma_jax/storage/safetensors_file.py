"""Safetensors files, read and written one tensor at a time.

The safetensors library validates a file and its header here, but it maps the whole file for reading and needs all
tensors in memory for writing, so this module reads and writes the bytes. The format: eight bytes with the header's
length, a JSON header (name -> dtype, shape, start and end offset), and the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Callable, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open

from magma_jax.output import OutputError, whole_output
from magma_jax.storage.byte_file import ByteFile, WeightFileError
from magma_jax.storage.deferred import Tensor, elements_ahead
from magma_jax.storage.torch.storage import DTYPES, MAX_AXES, LazyTensor, contiguous

# Dtype names of the format -> PyTorch's.
_NAMES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
_DTYPES = {name: DTYPES[dtype] for name, dtype in _NAMES.items()}
_ALIGNMENT = 8


def open_safetensors(path: str | os.PathLike) -> tuple[ByteFile, dict[str, LazyTensor], dict[str, str]]:
    """Opens a file; returns it (the caller closes it), its tensors in file order, and its metadata.

    Raises:
        WeightFileError: not a complete safetensors file, or a tensor that NumPy cannot represent. OSError: no such
            file.
    """
    file = ByteFile(path)
    try:
        try:
            with safe_open(file.path, framework="np"):  # validates offsets, sizes and overlaps
                pass
        except SafetensorError as error:
            raise WeightFileError(f"{path}: cut short or no safetensors file ({error}); fetch it again") from None
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])
        metadata = header.pop("__metadata__", None) or {}
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise WeightFileError(f"{path}: {name} has the element type {entry['dtype']}, which is not supported")
            if len(entry["shape"]) > MAX_AXES:
                raise WeightFileError(f"{path}: {name} has {len(entry['shape'])} axes, more than {MAX_AXES}")
            start = 8 + length + entry["data_offsets"][0]
            tensors[name] = contiguous(file, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    except BaseException:
        file.close()
        raise
    return file, tensors, metadata


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a file atomically, one tensor at a time.

    Args:
        tensors: arrays, or anything with ``shape``, ``dtype`` and ``read()``. Tied tensors are written twice, since the
            format has no sharing.
        metadata: text by name.
        progress: called with the number of bytes after each tensor.

    Raises:
        ValueError: the array read differs from the tensor's shape or dtype.
        OutputError: an element type that the format lacks, or the disk is too small.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest elements first: every tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    end = 0
    for name in order:
        tensor = tensors[name]
        dtype = np.dtype(tensor.dtype)
        if dtype not in names:
            raise OutputError(f"{name}: {dtype} is not supported in a safetensors file; convert it first")
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with whole_output(path, nbytes=8 + len(text) + end) as partial, partial.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for elements in elements_ahead(tensors[name] for name in order):
            file.write(elements.data)
            progress(elements.nbytes)
        file.flush()
        os.fsync(file.fileno())
