"""Opens weight files of all formats.

    with open_tensors("gpt-j-6b") as weights:
        weights.tensors["transformer.wte.weight"].read()

Formats: PyTorch's ``.pt`` and ``.bin`` (zip and legacy), ``.safetensors``, and a folder or ``*.index.json`` of sharded
files in Hugging Face's layout. Opening reads names and shapes; tensors are read on demand, so that files may be larger
than memory.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magma_jax.foreign import ForeignError, read_json, shown
from magma_jax.storage.byte_file import WeightFileError
from magma_jax.storage.safetensors_file import open_safetensors
from magma_jax.storage.torch.reader import open_torch_file, state_dict
from magma_jax.storage.torch.storage import LazyTensor

__all__ = ["WeightFileError", "Weights", "holds_weights", "open_tensors"]

# Weight files of a folder; the first one that exists is opened.
FOLDER_FILES = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Weights:
    """Open weights.

    Attributes:
        tensors: tensors by name, with ``shape``, ``dtype``, ``read()`` (a NumPy array in the stored dtype),
            ``alias_key`` (equal for tied tensors) and ``position`` (file and byte offset).
        others: other values: counters of a checkpoint, metadata of safetensors.
        files: the weight files, in the order of reading.
        metadata_is_text: whether ``others`` is the metadata of a safetensors file, not objects of a checkpoint.
    """

    tensors: dict[str, LazyTensor]
    others: dict[Any, Any]
    files: tuple[Path, ...]
    metadata_is_text: bool = False


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Weights]:
    """Opens the weights at ``path``: a file, a folder of files, or the index of sharded files.

    Arrays remain valid after the block; unread tensors do not.

    Raises:
        WeightFileError: no known format, a damaged file, or an index that disagrees with its shards.
        TorchFileError: a PyTorch file that is damaged or contains more than tensors. OSError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = _inside(path)
    with contextlib.ExitStack() as stack:
        if path.name.endswith(".index.json"):
            yield _open_index(path, stack)
        else:
            tensors, others = _open_one(path, stack)
            yield Weights(tensors, others, (path,), path.suffix == ".safetensors")


def holds_weights(path: Path) -> bool:
    """Whether ``open_tensors`` can open the path: a file, or a folder with weight files."""
    return bool(_candidates(path)) if path.is_dir() else path.exists()


def _candidates(folder: Path) -> list[Path]:
    return [file for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pt") for file in folder.glob(pattern)]


def _inside(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    found = _candidates(folder)
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(file.name for file in found)[:5])
    raise WeightFileError(
        f"{folder}: holds several weight files and no index ({names}); name one of them"
        if found
        else f"{folder}: holds no weights ({', '.join(FOLDER_FILES)} or a single .safetensors, .bin or .pt)"
    )


def _open_one(path: Path, stack: contextlib.ExitStack) -> tuple[dict[str, LazyTensor], dict[Any, Any]]:
    if path.suffix == ".safetensors":
        file, tensors, metadata = open_safetensors(path)
        stack.callback(file.close)
        return tensors, metadata
    file = stack.enter_context(open_torch_file(path))
    try:
        return state_dict(file.tree)
    except WeightFileError as error:
        raise type(error)(f"{path}: {error}") from None


def _open_index(index: Path, stack: contextlib.ExitStack) -> Weights:
    shard_of = _read_index(index)
    files = tuple(index.parent / name for name in dict.fromkeys(shard_of.values()))
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        if not file.is_file():
            raise WeightFileError(f"{index}: the shard {file.name} is missing; fetch it again")
        found, _ = _open_one(file, stack)
        wanted = {key for key, shard in shard_of.items() if shard == file.name}
        if surplus := sorted(found.keys() - wanted):
            raise WeightFileError(
                f"{file}: holds tensors of which {index.name} does not know, {len(surplus)} in all, such as "
                f"{shown(surplus[:3])}; fetch both again"
            )
        # Libraries may list both names of a tied tensor in the index but store only one. Other missing tensors are
        # reported by the key map.
        if absent := sorted(wanted - found.keys()):
            print(f"{file}: lacks {shown(absent[:3])}, which {index.name} lists; treated as aliases", file=sys.stderr)
        tensors |= found
    return Weights(tensors, {}, files)


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        content = read_json(index)
    except ForeignError as error:
        raise WeightFileError(f"{index}: {error}; fetch it again") from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise WeightFileError(f"{index}: has no weight_map; it is not an index of sharded weights")
    for name in shard_of.values():
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
            raise WeightFileError(
                f"{index}: the shard {shown(name)} is not a file name beside it; do not trust this index"
            )
    return shard_of
