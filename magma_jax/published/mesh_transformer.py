"""GPT-J "slim" checkpoints of its training code, mesh-transformer-jax: a folder of NumPy archives.

The format, from that repository's ``checkpoint.py``, ``slim_model.py`` and ``to_hf_weights.py``:

    shard_0/0.npz ... shard_0/15.npz ... shard_7/15.npz

Each of the (eight) shards holds its slice of every array. The arrays are the leaves of the parameter tree in JAX's
order (sorted names), followed by a step counter, spread evenly over sixteen files. Names are not stored, so arrays are
identified by their order. Matrices are (in, out). A shard holds a slice of the heads, the feed-forward width and the
vocabulary; biases after a sum over shards are summed, and only the first shard's LayerNorms were trained. The embedding
table is a linear layer whose bias is added to every row. bfloat16 is stored as two raw bytes.
"""

import math
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from magma_jax.foreign import shown
from magma_jax.storage.byte_file import WeightFileError
from magma_jax.storage.deferred import Deferred

FILES = 16

# Combines the arrays of all shards into one in (out, in) order.
Combine = Callable[[Sequence[np.ndarray]], np.ndarray]


def _columns(shards: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([shard.T for shard in shards])


def _rows(shards: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(shards).T


def _sum(shards: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum(np.stack(shards).astype(np.float32), axis=0)


def _first(shards: Sequence[np.ndarray]) -> np.ndarray:
    return shards[0]


class _Leaf(NamedTuple):
    name: str  # in the training code; defines the order
    theirs: str  # Hugging Face's name
    ndim: int
    combine: Combine


class _Place(NamedTuple):
    file: str
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype


LAYER = (
    ("linear/w", "attn.q_proj.weight", 2, _columns),
    ("linear_1/w", "attn.v_proj.weight", 2, _columns),
    ("linear_2/w", "attn.k_proj.weight", 2, _columns),
    ("linear_3/w", "attn.out_proj.weight", 2, _rows),
    ("linear_4/b", "mlp.fc_in.bias", 1, np.concatenate),
    ("linear_4/w", "mlp.fc_in.weight", 2, _columns),
    ("linear_5/b", "mlp.fc_out.bias", 1, _sum),
    ("linear_5/w", "mlp.fc_out.weight", 2, _rows),
    ("replicated_layer_norm/offset", "ln_1.bias", 1, _first),
    ("replicated_layer_norm/scale", "ln_1.weight", 1, _first),
)
OTHERS = (
    ("embedding_shard/~/linear/b", "wte.bias", 1, _sum),
    ("embedding_shard/~/linear/w", "wte.weight", 2, np.concatenate),
    ("projection_shard/~/linear/b", "lm_head.bias", 1, np.concatenate),
    ("projection_shard/~/linear/w", "lm_head.weight", 2, _columns),
    ("projection_shard/~/replicated_layer_norm/offset", "transformer.ln_f.bias", 1, _first),
    ("projection_shard/~/replicated_layer_norm/scale", "transformer.ln_f.weight", 1, _first),
)


def is_mesh_transformer(path: Path) -> bool:
    """Whether a folder is a mesh-transformer-jax checkpoint."""
    return (path / "shard_0" / "0.npz").is_file()


def mesh_transformer_files(folder: str | Path) -> tuple[Path, ...]:
    """Files of a checkpoint."""
    return tuple(sorted(Path(folder).glob("shard_*/*.npz")))


def open_mesh_transformer(folder: str | Path) -> dict[str, Deferred]:
    """Lazy tensors of a slim checkpoint under Hugging Face's GPT-J names.

    Raises:
        WeightFileError: a file is missing or damaged, or the arrays are not those of a slim GPT-J.
    """
    folder = Path(folder)
    count = len([path for path in folder.glob("shard_*") if re.fullmatch(r"shard_\d+", path.name)])
    shards = [_places(folder / f"shard_{i}") for i in range(count)]
    leaves = _leaves(folder, len(shards[0]))
    if any(len(places) != len(shards[0]) for places in shards):
        raise WeightFileError(f"{folder}: its shards do not hold the same number of arrays; copy it again")
    tensors: dict[str, Deferred] = {}
    for leaf, *places in zip(leaves, *shards, strict=False):  # after the leaves: the step
        if any(len(place.shape) != leaf.ndim or place.dtype.kind not in "fV" for place in places):
            raise WeightFileError(
                f"{places[0].file}: {places[0].member} is {places[0].dtype}{list(places[0].shape)}, which is not "
                f"{leaf.name} of a slim GPT-J; only slim checkpoints of it can be read"
            )
        tensors[leaf.theirs] = _tensor(leaf, places)
    table, bias = tensors.pop("wte.weight"), tensors.pop("wte.bias")
    tensors["transformer.wte.weight"] = Deferred(
        table.shape, np.dtype(np.float32), lambda: table.read().astype(np.float32) + bias.read()
    )
    return tensors


def _leaves(folder: Path, arrays: int) -> list[_Leaf]:
    layers, rest = divmod(arrays - len(OTHERS), len(LAYER))
    if rest not in (0, 1) or layers < 1:
        raise WeightFileError(f"{folder}: holds {arrays} arrays, which no slim GPT-J does; was the optimizer left in?")
    leaves = [_Leaf(*entry) for entry in OTHERS]
    for i in range(layers):
        leaves += [
            _Leaf(f"layer_{i}/~/{name}", f"transformer.h.{i}.{theirs}", ndim, combine)
            for name, theirs, ndim, combine in LAYER
        ]
    # Sorted by module name, then by parameter name; layer_10 precedes layer_2.
    return sorted(leaves, key=lambda leaf: leaf.name.rsplit("/", 1))


def _number(name: str) -> int:
    if (found := re.fullmatch(r"arr_(\d+)\.npy", name)) is None:
        raise ValueError(f"{name} is not an array of a checkpoint")
    return int(found[1])


def _places(folder: Path) -> list[_Place]:
    places = []
    for i in range(FILES):
        path = folder / f"{i}.npz"
        try:
            with zipfile.ZipFile(path) as archive:
                # Written in order, as arr_0, arr_1, ...
                for name in sorted(archive.namelist(), key=_number):
                    with archive.open(name) as member:
                        version = np.lib.format.read_magic(member)
                        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                        if read is None:
                            raise ValueError(f"{name} has the NumPy format {version}")
                        shape, _, dtype = read(member)
                        size = archive.getinfo(name).file_size
                        if math.prod(shape) * dtype.itemsize > size or size > path.stat().st_size:
                            raise ValueError(f"{name} claims the shape {shown(shape)}, but has {size} bytes")
                    places.append(_Place(str(path), name, shape, dtype))
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise WeightFileError(f"{path}: missing or damaged ({error}); copy the checkpoint again") from None
    return places


def _tensor(leaf: _Leaf, places: Sequence[_Place]) -> Deferred:
    def read() -> np.ndarray:
        return leaf.combine([_read(place) for place in places])

    shape, count = places[0].shape, len(places)
    if leaf.combine in (_columns, _rows):
        shape = shape[::-1]
    if leaf.combine in (_columns, np.concatenate):
        shape = shape[0] * count, *shape[1:]
    if leaf.combine is _rows:
        shape = shape[0], shape[1] * count
    dtype = np.dtype(np.float32) if leaf.combine is _sum else _dtype(places[0])
    return Deferred(shape, dtype, read)


def _dtype(place: _Place) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if place.dtype == np.dtype("V2") else place.dtype


def _read(place: _Place) -> np.ndarray:
    with np.load(place.file, allow_pickle=False) as archive:
        return archive[place.member.removesuffix(".npy")].view(_dtype(place))
