"""Writes checkpoints that ``torch.load(path, weights_only=True)`` reads, without PyTorch.

The format is the zip archive of PyTorch >= 1.6, see ``storage.torch.reader``. Tensors are read one at a time during
writing, so that a checkpoint may be larger than memory.
"""

import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from magma_jax.output import OutputError, whole_output
from magma_jax.storage.deferred import Tensor, alias_key, elements_ahead
from magma_jax.storage.torch.storage import DTYPES, STORAGES

# PyTorch aligns every storage to 64 bytes so that it can be mapped into memory.
ALIGNMENT = 64
# Any directory name is valid; PyTorch uses this one when it writes to a stream.
ROOT = "archive"
_STORAGE_NAMES = {DTYPES[dtype]: storage for storage, dtype in STORAGES.items()}
_LOCAL_HEADER_NBYTES = 30
_ZIP64_EXTRA_NBYTES = 20
_PADDING_ID = 0x4246  # the id of PyTorch's own padding field: "FB"
_MAX_DEPTH = 100


def write_torch_file(
    path: str | os.PathLike, tree: object, progress: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes ``tree`` so that ``torch.load(path, weights_only=True)`` returns it.

    ``tree`` consists of dicts, lists, tuples, strings, numbers, booleans, None, and tensors: NumPy arrays (ml_dtypes'
    bfloat16 included) or anything with ``shape``, ``dtype`` and ``read()``, such as ``Deferred`` or a ``LazyTensor`` of
    another file. The same object in two places becomes two tensors that share one storage, as tied weights do in
    PyTorch; so do two LazyTensors over the same elements. ``progress`` is called with the number of bytes after every
    storage.

    The file is written atomically; an error leaves the previous file in place. Raises TypeError for objects that a
    checkpoint cannot hold, ValueError if the array read differs from a deferred tensor's shape or dtype, OutputError
    for an element type that the format lacks, or if the disk is too small.
    """
    pickled = _Pickled(tree)  # before touching the disk, so that an invalid leaf is found at once
    nbytes = len(pickled.code) + sum(_nbytes(tensor) + 2 * ALIGNMENT for tensor in pickled.tensors)
    with whole_output(path, nbytes=nbytes) as partial, partial.open("xb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            _write_entry(archive, "data.pkl", bytes(pickled.code))
            _write_entry(archive, "byteorder", b"little")
            for key, elements in enumerate(elements_ahead(pickled.tensors)):
                _write_entry(archive, f"data/{key}", elements.data)
                progress(elements.nbytes)
            _write_entry(archive, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # constant date, so that equal trees give equal files
    large = len(content) > zipfile.ZIP64_LIMIT
    header = _LOCAL_HEADER_NBYTES + len(info.filename) + large * _ZIP64_EXTRA_NBYTES + 4
    assert archive.fp is not None  # it is open
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(content)


class _Pickled:
    """``code``: the pickle (protocol 2, required by ``weights_only``); ``tensors[k]``: content of storage k."""

    def __init__(self, tree: object):
        self.code, self.tensors, self._storage_of = bytearray(b"\x80\x02"), [], {}
        self._put(tree, "", 0)
        self.code += b"."

    def _put(self, value: object, where: str, depth: int) -> None:
        code = self.code
        if depth > _MAX_DEPTH:
            raise TypeError(f"{where[:80]}...: nested more than {_MAX_DEPTH} deep, or contains itself")
        match value:
            case None | bool():
                code += {None: b"N", True: b"\x88", False: b"\x89"}[value]
            case int() if -(2**31) <= value < 2**31:
                code += struct.pack("<ci", b"J", value)
            case int() if -(2**63) <= value < 2**64:
                code += struct.pack("<cB", b"\x8a", 9) + value.to_bytes(9, "little", signed=True)
            case float():
                code += struct.pack(">cd", b"G", value)
            case str():
                text = value.encode()
                code += struct.pack("<cI", b"X", len(text)) + text
            case dict():
                code += b"ccollections\nOrderedDict\n)R(" if isinstance(value, OrderedDict) else b"}("
                for key, item in value.items():
                    if not isinstance(key, str | int):
                        raise TypeError(f"{where or 'the top'}: the key {key!r} is neither a string nor an integer")
                    self._put(key, where, depth + 1)
                    self._put(item, f"{where}[{key!r}]", depth + 1)
                code += b"u"
            case list() | tuple():
                code += b"](" if isinstance(value, list) else b"("
                for index, item in enumerate(value):
                    self._put(item, f"{where}[{index}]", depth + 1)
                code += b"e" if isinstance(value, list) else b"t"
            case Tensor() if isinstance(value, np.ndarray) or hasattr(value, "read"):
                self._put_tensor(value, where)
            case _:
                raise TypeError(f"{where or 'the top'}: a checkpoint cannot hold a {type(value).__name__}")

    def _put_tensor(self, tensor: Tensor, where: str) -> None:
        name = _STORAGE_NAMES.get(np.dtype(tensor.dtype))
        if name is None:
            raise OutputError(
                f"{where or 'the top'}: {tensor.dtype} is not supported in a PyTorch file; convert it first"
            )
        key = self._storage_of.setdefault(alias_key(tensor), len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(tensor)
        shape = tuple(int(n) for n in tensor.shape)
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        # torch._utils._rebuild_tensor_v2(storage, offset=0, shape, strides, requires_grad=False, hooks={})
        self.code += b"ctorch._utils\n_rebuild_tensor_v2\n("
        self.code += b"(X\x07\0\0\0storagectorch\n" + name.encode() + b"\n"
        for item in (str(key), "cpu", math.prod(shape)):
            self._put(item, where, 0)
        self.code += b"tQ"
        for item in (0, shape, strides, False, OrderedDict()):
            self._put(item, where, 0)
        self.code += b"tR"
