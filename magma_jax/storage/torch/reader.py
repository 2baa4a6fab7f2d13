"""Opens PyTorch checkpoints without PyTorch, without executing their content, and without loading the tensors.

There are two formats. Since PyTorch 1.6 a checkpoint is a zip archive of uncompressed entries: ``NAME/data.pkl``
describes the objects, ``NAME/data/KEY`` holds the bytes of one storage. The legacy format is a sequence of pickles
(magic number, protocol version, machine, objects, storage keys), then each storage's element count and bytes.

TorchScript archives, such as OpenAI's CLIP, are zip archives too, with compiled code beside the tensors. The code is
ignored; parameters and buffers are returned under their ``state_dict()`` names.
"""

import io
import os
import struct
import zipfile

from magma_jax.foreign import shown
from magma_jax.storage.byte_file import ByteFile, WeightFileError
from magma_jax.storage.torch.pickle import Attributes, BadPickle, unpickle
from magma_jax.storage.torch.storage import LazyTensor, Storage

__all__ = ["LazyTensor", "TorchFile", "TorchFileError", "open_torch_file", "state_dict"]

# The pickle of the largest published MAGMA takes 0.5 MiB. The limit is for hostile ones, which can make Python allocate
# about a hundred times their size.
MAX_PICKLE_NBYTES = 16 * 2**20

# CLIP's largest file has 600 modules, nested seven deep.
MAX_SCRIPT_MODULES, MAX_SCRIPT_DEPTH = 20_000, 32

# The pickled number 0x1950a86a20f9469cfc6c; every legacy file starts with a pickle header and this.
LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LEGACY_PROTOCOL = 1001

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class TorchFileError(WeightFileError):
    """File that is not a readable PyTorch checkpoint; one line with the file, the reason and the remedy."""


class TorchFile:
    """Open checkpoint, a context manager.

    ``tree`` is the saved object as plain dicts, lists, tuples, numbers and strings, with a ``LazyTensor`` for each
    tensor or parameter. Arrays remain valid after the file is closed; unread tensors do not.
    """

    def __init__(self, tree: object, file: ByteFile):
        self.path, self.tree, self._file = file.path, tree, file

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_torch_file(path: str | os.PathLike) -> TorchFile:
    """Opens a checkpoint of ``torch.save``, in either format.

    Reads only the description of the tensors; their bytes are read on demand. Raises TorchFileError, or OSError if
    there is no such file.
    """
    storages: dict[str, Storage] = {}
    file = ByteFile(path)
    try:
        head = file[:1024]
        if not head:
            raise BadPickle("the file is empty; the download failed, fetch it again")
        if head.startswith(b"PK\x03\x04"):
            tree = _read_zip(file, storages)
        elif head[:1] == b"\x80" and LEGACY_MAGIC in head[:32]:
            tree = _read_legacy(file, storages)
        else:
            raise BadPickle(_what_else(head))
    except BaseException as error:
        file.close()
        if isinstance(error, BadPickle):
            raise TorchFileError(f"{path}: {error}") from error
        raise
    for storage in storages.values():
        storage.file = file
    return TorchFile(tree, file)


def state_dict(tree: object) -> tuple[dict[str, LazyTensor], dict]:
    """Finds the weights in the tree of a checkpoint.

    Supports ``{"module": weights, ...}`` (DeepSpeed), ``{"state_dict": weights, ...}`` and bare weights. Returns the
    weights, name -> tensor, and the other entries (step counters, settings). Raises TorchFileError if there are no
    weights.
    """
    if not isinstance(tree, dict):
        raise TorchFileError(f"the checkpoint holds a {type(tree).__name__}, not a dict of weights")
    for name in ("module", "state_dict"):
        if isinstance(tree.get(name), dict):
            weights = tree[name]
            strange = [key for key, value in weights.items() if not isinstance(value, LazyTensor)]
            if strange:
                raise TorchFileError(
                    f"the checkpoint's {name!r} has entries that are not tensors: {shown(strange[:20])}"
                )
            return weights, {key: value for key, value in tree.items() if key != name}
    weights = {key: value for key, value in tree.items() if isinstance(value, LazyTensor)}
    if not weights:
        raise TorchFileError(
            f"no weights under 'module', under 'state_dict' or at the top; the top has {shown(list(tree)[:20], 300)}"
        )
    return weights, {key: value for key, value in tree.items() if key not in weights}


def _read_zip(file: ByteFile, storages: dict[str, Storage]) -> object:
    entries = _zip_entries(file)
    roots = [name.removesuffix("data.pkl") for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise BadPickle("it is a zip archive, but not one of PyTorch: there is no single NAME/data.pkl in it")
    (root,) = roots
    script = root + "constants.pkl" in entries
    if root + "byteorder" in entries:
        start, nbytes = entries[root + "byteorder"]
        if file[start : start + min(nbytes, 16)] != b"little":
            raise BadPickle("it was written by a big-endian machine, which is not supported")

    start, nbytes = entries[root + "data.pkl"]
    if nbytes > MAX_PICKLE_NBYTES:
        raise BadPickle(f"its pickle takes {nbytes} bytes, more than the limit of {MAX_PICKLE_NBYTES}")
    tree = unpickle(io.BytesIO(file[start : start + nbytes]), storages, len(file), script=script)
    for storage in storages.values():
        name = f"{root}data/{storage.key}"
        if name not in entries:
            raise BadPickle(f"its storage {name[:100]!r} is missing; the archive is incomplete")
        storage.start, nbytes = entries[name]
        # A storage viewed as a wider dtype may end with a partial element.
        if not 0 <= nbytes - storage.nbytes < storage.dtype.itemsize:
            raise BadPickle(f"storage {name!r} should have {storage.nbytes} bytes but has {nbytes}")
    return _script_tensors(tree) if script else tree


def _script_tensors(module: object) -> dict[str, LazyTensor]:
    """Tensors of nested modules by dotted name."""
    tensors: dict[str, LazyTensor] = {}
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        # A hostile pickle can contain cycles, or reference one object many times over.
        if seen > MAX_SCRIPT_MODULES or prefix.count(".") > MAX_SCRIPT_DEPTH:
            raise BadPickle("its modules contain each other without end; do not trust this file")
        if not isinstance(module, Attributes):
            continue
        tensors |= {prefix + name: value for name, value in module.items() if isinstance(value, LazyTensor)}
        modules = [(f"{prefix}{name}.", value) for name, value in module.items() if isinstance(value, Attributes)]
        waiting += reversed(modules)
    return tensors


def _zip_entries(file: ByteFile) -> dict[str, tuple[int, int]]:
    """Name -> (position in the file, size); entries must not overlap."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos, directory_start = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise BadPickle(f"the zip archive is cut short or damaged ({error}); fetch it again") from error

    entries: dict[str, tuple[int, int]] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.orig_filename
        # A TorchScript archive's code is compressed; it is never read.
        is_code = name.split("/")[1:2] == ["code"]
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored and not is_code:
            raise BadPickle(f"entry {name!r} is compressed, which PyTorch never does; unpack and store it")
        if name in entries or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise BadPickle(f"entry {name!r} is there twice or leads out of the archive; do not trust this file")
        data = info.header_offset + _LOCAL_HEADER.size
        header = file[info.header_offset : data]
        if info.header_offset < end or data > directory_start or not header.startswith(b"PK\x03\x04"):
            raise BadPickle(f"entry {name!r} does not lie where the archive says; the file is damaged")
        name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)[-2:]
        encoded = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if file[data : data + name_nbytes] != encoded:
            raise BadPickle(f"entry {name!r} has another name inside the archive; the file is damaged")
        start = data + name_nbytes + extra_nbytes
        end = start + info.compress_size
        if end > directory_start:
            raise BadPickle(f"entry {name!r} reaches past the end of the archive; fetch it again")
        entries[name] = start, info.compress_size
    return entries


def _read_legacy(file: ByteFile, storages: dict[str, Storage]) -> object:
    stream = io.BytesIO(file[:MAX_PICKLE_NBYTES])
    _, protocol, machine = (unpickle(stream, {}) for _ in range(3))
    little_endian = isinstance(machine, dict) and machine.get("little_endian") is True
    if protocol != LEGACY_PROTOCOL or not little_endian:
        raise BadPickle("it has another legacy protocol or a big-endian byte order, which are not supported")
    tree = unpickle(stream, storages, len(file))
    keys = unpickle(stream, {})
    names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if sorted(names) != sorted(storages):
        raise BadPickle("its list of storages is not that of its tensors; the file is damaged")

    position = stream.tell()
    for key in names:
        storage, start = storages[key], position + 8
        position = start + storage.nbytes
        if position > len(file):
            raise BadPickle(f"it is cut short by {position - len(file)} bytes or more; fetch it again")
        numel = int.from_bytes(file[start - 8 : start], "little", signed=True)
        if numel != storage.numel:
            raise BadPickle(f"storage {key!r} should have {storage.numel} elements but has {numel}")
        storage.start = start
    return tree


def _what_else(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "it is a web page, saved as a checkpoint; fetch the file itself, not its download page"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; run `git lfs pull`"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "it is a safetensors file; open it as one"
    for magic, kind in (
        (b"\x1f\x8b", "gzip-compressed; unpack it first"),
        (b"PK", "an empty or split zip archive; fetch it again"),
        (b"\x89HDF", "an HDF5 file, not a PyTorch checkpoint"),
        (b"\x93NUMPY", "a NumPy array, not a PyTorch checkpoint"),
        (b"GGUF", "a GGUF file, not a PyTorch checkpoint"),
        (b"\x80", "a pickle, but not a PyTorch checkpoint"),
    ):
        if head.startswith(magic):
            return f"it is {kind}"
    if head[257:262] == b"ustar":
        return "it is a tar archive, as PyTorch wrote them until 0.1.9; unpack it or save it again"
    return f"it is not a PyTorch checkpoint: it starts with {head[:16]!r}; check where it came from"
