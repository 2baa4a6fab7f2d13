"""Arrays of a model folder, in the format of ``orbax.checkpoint``, written and read layer by layer.

Orbax saves only whole arrays, and the stack of one projection of a 6 B model takes 3.8 GB. So Orbax saves a skeleton
with a scalar for every parameter, which creates its metadata files, and each scalar is then replaced by the real array.
In Orbax's plain layout, which a public option selects, an array is a folder of zarr format 2 and its shape is stored
only there. TensorStore, Orbax's own backend, writes the layers one at a time.

Values are not compressed: weights in half precision shrink by a tenth and take several times as long.
"""

import contextlib
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore as ts

from magma_jax.foreign import read_json
from magma_jax.nn.modules import nest
from magma_jax.runtime.distributed import is_main
from magma_jax.storage.deferred import Deferred, read_array, read_row
from magma_jax.typing import Params

# Size of a chunk file: few files, but small enough for devices that read only a shard of an array.
CHUNK_NBYTES = 32 * 2**20
# Smaller rows of a stack share a chunk.
_ROW_NBYTES = 2**20
# Bytes queued for writing, in addition to the tensor being read.
_IN_FLIGHT_NBYTES = 512 * 2**20
# Arrays are loaded largest first in groups of this size, see ``read_arrays``.
_GROUP_NBYTES = 256 * 2**20


def write_arrays(
    folder: Path, params: Mapping[str, Any], progress: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes parameters so that ``orbax.checkpoint.experimental.v1.load(folder)`` returns them as nested dicts.

    Args:
        folder: absolute path; must not exist.
        params: flat dict of arrays of any library or ``Deferred``; stacks are read layer by layer, tensors from files
            in file order.
        progress: called with the number of bytes after each write.

    Raises:
        ValueError: the array read differs from a deferred tensor's shape or dtype.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    with context, _without_warnings():
        ocp.save(str(folder), nest({path: np.zeros(1, np.dtype(leaf.dtype)) for path, leaf in params.items()}))
    if not is_main():  # all processes must take part in Orbax's save; process 0 does the rest
        return
    places = _places(folder, params)
    stores = {path: _create(places[path], leaf) for path, leaf in params.items()}
    pieces = sorted(itertools.chain.from_iterable(_pieces(path, leaf) for path, leaf in params.items()))
    waiting: deque[tuple[Any, int]] = deque()
    try:
        for _, path, row in pieces:
            leaf = params[path]
            array = np.asarray(read_array(leaf) if row is None else read_row(leaf, row), order="C")
            shape = tuple(leaf.shape) if row is None else tuple(leaf.shape[1:])
            if array.shape != shape or array.dtype != leaf.dtype:
                raise ValueError(f"{path}: announced as {shape} {leaf.dtype}, read as {array.shape} {array.dtype}")
            store = stores[path].result() if row is None else stores[path].result()[row]
            write = store.write(array, can_reference_source_data_indefinitely=True)
            waiting.append((write, array.nbytes))
            while waiting and sum(nbytes for _, nbytes in waiting) > _IN_FLIGHT_NBYTES:
                _finish(waiting, progress)
        while waiting:
            _finish(waiting, progress)
    finally:
        # After an error the folder is removed, so pending writes must end first.
        for write, _ in waiting:
            with contextlib.suppress(Exception):
                write.result()


def open_arrays(folder: Path) -> dict[str, Deferred]:
    """Lazy arrays of a folder written by Orbax or ``write_arrays``; stacks can be read layer by layer.

    Raises:
        ValueError: an array's chunks exceed this machine's memory or have the wrong size. Also any error of
            TensorStore.
    """
    (metadata,) = folder.glob("*/_METADATA")
    return open_item(metadata.parent)


def open_item(folder: Path) -> dict[str, Deferred]:
    """Lazy arrays of one item of a checkpoint, as ``open_arrays``."""
    layout = read_json(folder / "_METADATA")
    driver = "zarr3" if layout["use_zarr3"] else "zarr"
    base = {"driver": "file", "path": f"{folder}/"}
    stores = {}
    for entry in layout["tree_metadata"].values():
        if entry.get("value_metadata", {}).get("skip_deserialize"):  # an empty subtree
            continue
        keys = [key["key"] for key in entry["key_metadata"]]
        name = ".".join(keys)
        kvstore = {"driver": "file", "path": f"{folder}/{name}/"}
        if layout["use_ocdbt"]:  # a single database for all arrays, Orbax's default
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        stores["/".join(keys)] = ts.open({"driver": driver, "kvstore": kvstore}, read=True, open=True)
    arrays = {}
    for path, store in stores.items():
        arrays[path] = _deferred(path, store.result())
        if driver == "zarr" and not layout["use_ocdbt"]:
            _check_parts(folder / path.replace("/", "."), store.result())
    return arrays


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], stored: Mapping[str, Any]) -> Params:
    """Loads arrays into the dtypes and shardings of ``wanted``; other paths of ``stored`` are not read.

    Moving an array to its devices may take a second copy. Arrays are loaded largest first, in groups, so that peak
    memory stays close to the total size.

    Raises:
        ValueError: an array is larger than this machine's memory. Also any error of Orbax.
    """
    for path, leaf in wanted.items():
        shard = leaf.sharding.shard_shape(tuple(leaf.shape)) if leaf.sharding else leaf.shape
        _check_memory(path, shard, leaf.dtype)
    sizes = {path: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for path, leaf in wanted.items()}
    loaded: Params = {}
    for group in _groups(sizes):
        placeholders = {path: wanted[path] if path in group else ocp.PLACEHOLDER for path in stored}
        arrays = flatten(ocp.load(str(folder), nest(placeholders)))
        loaded |= {path: jax.block_until_ready(arrays[path]) for path in group}
    return {path: loaded[path] for path in wanted}


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one dict by path; the inverse of ``nest``."""
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _places(folder: Path, params: Mapping[str, Any]) -> dict[str, Path]:
    """zarr folder of each parameter, by path."""
    found = {file.parent.name.replace(".", "/"): file.parent for file in folder.glob("*/*/.zarray")}
    if found.keys() != params.keys():
        raise RuntimeError(f"{folder}: this release of orbax-checkpoint lays arrays out in another way")
    return found


def _create(place: Path, leaf: Any) -> ts.Future:
    return ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{place}/"},
            "metadata": {"compressor": None},
            # Orbax treats a missing chunk as damage, not as zeros.
            "store_data_equal_to_fill_value": True,
        },
        dtype=ts.dtype(np.dtype(leaf.dtype)),
        shape=leaf.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=_chunk_shape(leaf)),
        create=True,
        delete_existing=True,
    )


def _chunk_shape(leaf: Any) -> tuple[int, ...]:
    """Chunk shape of at most CHUNK_NBYTES; only small layers share a chunk."""
    inner = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    chunk = [max(1, size) for size in leaf.shape]
    for axis, size in enumerate(leaf.shape):
        if inner <= CHUNK_NBYTES:
            break
        inner //= size
        chunk[axis] = 1 if axis == 0 and inner >= _ROW_NBYTES else min(size, max(1, CHUNK_NBYTES // inner))
        if chunk[axis] > 1:
            break
    return tuple(chunk)


def _pieces(path: str, leaf: Any) -> Iterator[tuple[tuple[str, int], str, int | None]]:
    """Units of reading and writing: position in the source, path, row (None for the whole array)."""
    if len(leaf.shape) > 1 and leaf.shape[0] > 1 and _chunk_shape(leaf)[0] == 1:
        rows = getattr(leaf, "rows", ()) or [leaf] * leaf.shape[0]
        for i, row in enumerate(rows):
            yield getattr(row, "position", ("", 0)), path, i
    else:
        yield getattr(leaf, "position", ("", 0)), path, None


def _finish(waiting: deque[tuple[Any, int]], progress: Callable[[int], None]) -> None:
    write, nbytes = waiting.popleft()
    write.result()
    progress(nbytes)


def _deferred(path: str, store: ts.TensorStore) -> Deferred:
    shape, dtype = tuple(store.shape), store.dtype.numpy_dtype
    # TensorStore trusts the chunk size in the metadata and aborts the process when memory runs out.
    for layout in (store.chunk_layout.read_chunk, store.chunk_layout.write_chunk):
        chunk = _chunk_of(layout)
        if any(part > max(1, size) for part, size in zip(chunk, shape, strict=True)):
            raise ValueError(f"{path} has the shape {list(shape)}, but parts of {list(chunk)}")
        _check_memory(path, chunk, dtype)

    def whole() -> np.ndarray:
        _check_memory(path, shape, dtype)
        return store.read().result()

    def row(i: int) -> Deferred:
        return Deferred(shape[1:], dtype, lambda: store[i].read().result())

    rows = (
        tuple(map(row, range(shape[0]))) if len(shape) > 1 and _chunk_of(store.chunk_layout.read_chunk)[0] == 1 else ()
    )
    return Deferred(shape, dtype, whole, rows)


def _chunk_of(layout: ts.ChunkLayout.Grid) -> tuple[int, ...]:
    """Chunk shape of an open array of known sizes; () for a scalar."""
    return tuple(size or 0 for size in layout.shape or ())


def _check_parts(place: Path, store: ts.TensorStore) -> None:
    """Checks the sizes of uncompressed chunk files, equal also at the edges; Orbax would only print warnings."""
    if store.spec().to_json()["metadata"]["compressor"] is not None:
        return
    chunk = _chunk_of(store.chunk_layout.read_chunk)
    nbytes = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
    parts = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
    for entry in parts:
        if entry.stat().st_size != nbytes:
            raise ValueError(f"{place.name}/{entry.name} has {entry.stat().st_size} bytes in place of {nbytes}")
    wanted = math.prod(-(-size // part) for size, part in zip(store.shape, chunk, strict=True))
    if len(parts) != wanted:
        raise ValueError(f"{place.name} has {len(parts)} parts in place of {wanted}")


def _check_memory(path: str, shape: Sequence[int], dtype: Any) -> None:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > memory:
        needed = f"{nbytes / 1e9:.3g} GB at once, and this machine has {memory / 1e9:.3g} GB of memory"
        raise ValueError(f"{path} takes {needed}")


def _groups(sizes: Mapping[str, int]) -> Iterator[set[str]]:
    group: set[str] = set()
    total = 0
    for path in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if group and total + sizes[path] > _GROUP_NBYTES:
            yield group
            group, total = set(), 0
        group.add(path)
        total += sizes[path]
    if group:
        yield group


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Orbax's warning that the plain layout has no databases to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
