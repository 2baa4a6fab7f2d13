"""Model folders: a model's config and all its parameters on disk.

    model.json    config, source, settings of a run
    params/       every parameter, nested dicts as Orbax loads them
    tokenizer/    the vocabulary
    SHA256SUMS    of all these files

Files that have changed since are noticed when they are read. A folder may lack parameters and say in ``model.json``
which folder has them, its base: so runs share one frozen language model. A folder appears under its final name only
when it is whole.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.foreign import ForeignError, read_json
from magma_jax.output import OutputError, partial_name, whole_output
from magma_jax.runtime.distributed import barrier, is_main, json_from_main, log_main
from magma_jax.storage.array_files import open_arrays, read_arrays, write_arrays
from magma_jax.storage.checksums import (
    SUMS_FILE,
    CheckpointError,
    comparing,
    read_checksums,
    regular_files,
    write_checksums,
)
from magma_jax.storage.deferred import Deferred
from magma_jax.typing import Params

MODEL_FILE = "model.json"
PARAMS = "params"
BASE = "base"
# What a conversion needs to write the same PyTorch file again.
TORCH_FILE = "torch.json"
BUFFER_FILE = "torch_buffers.npz"
# All that a run does not add later.
LISTED = (MODEL_FILE, PARAMS, "tokenizer", TORCH_FILE, BUFFER_FILE)
# Room on the disk for all that is not a parameter.
_OTHER_NBYTES = 32 * 2**20


# What to do about a changed file.
_REMEDY = "put the old file back or write the folder again"


class _Stored(NamedTuple):
    """A folder's own parameters, unread, and by parameter the sums of the files that it is in."""

    arrays: dict[str, Deferred]
    sums: dict[str, dict[str, str]]


def write_model_folder(
    path: str | Path,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    params: Mapping[str, Any],
    write_extras: Callable[[Path], object] = lambda folder: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a model folder: builds it under another name beside ``path``, then renames it.

    With several processes all must call this. The first one's parameters are written; the others may give shapes.

    Args:
        metadata: goes to ``model.json``; holds at least ``model``, the config. A function is called last, when all
            parameters have been read (it may hold a hash of what they were read from).
        params: flat dict of all parameters: arrays, or ``Deferred`` that are read while they are written, stacks
            layer by layer, so that a model larger than memory passes through.
        write_extras: adds files such as the tokenizer.
        progress: called with the number of bytes whenever some have been written.

    Raises:
        CheckpointError: something already stands at ``path``, or the disk is too small.
    """
    path = Path(path).absolute()  # Orbax takes no other
    if not is_main():
        barrier("model folder begun")
        write_arrays(partial_name(path) / PARAMS, params)
        barrier("model folder written")
        return
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: already exists; choose another name or remove it first")
    try:
        with whole_output(path, nbytes=nbytes_of(params) + _OTHER_NBYTES) as partial:
            partial.mkdir()
            barrier("model folder begun")
            write_arrays(partial / PARAMS, params, progress)
            write_extras(partial)
            values = metadata() if callable(metadata) else metadata
            (partial / MODEL_FILE).write_text(json.dumps(values, indent=2) + "\n")
            write_checksums(partial)
    except OutputError as error:
        raise CheckpointError(str(error)) from None
    barrier("model folder written")


def nbytes_of(params: Mapping[Any, Any]) -> int:
    """Size in bytes of arrays or shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in params.values())


def in_dtype(shapes: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes with another floating dtype; whole numbers and their scales (``nn.quantized``) stay."""

    def changes(path: str, leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and not path.endswith("/weight_scale")

    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))
        if changes(path, leaf)
        else leaf
        for path, leaf in shapes.items()
    }


def is_whole(dtype: Any) -> bool:
    """Whether numbers of a dtype are whole ones."""
    return np.issubdtype(np.dtype(dtype), np.integer)


def read_model_json(path: str | Path) -> dict[str, Any]:
    """The metadata of a model folder.

    Raises:
        CheckpointError: the folder or its ``model.json`` is missing, unreadable, or not as it was written.
    """
    file = Path(path) / MODEL_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: not a model folder (no {MODEL_FILE}); give the folder that train.py or convert wrote"
        )
    folder = Path(path)
    if MODEL_FILE in (sums := read_checksums(folder) or {}):
        _compared(folder, {MODEL_FILE: sums[MODEL_FILE]})
    try:
        metadata = read_json(file)
    except ForeignError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(metadata, dict) or "model" not in metadata:
        raise CheckpointError(f"{file}: holds no model config; write the folder again")
    return metadata


def base_reference(base: str | Path) -> dict[str, str]:
    """What ``model.json`` says, under ``BASE``, of the folder that holds the parameters which its own lacks."""
    return {"path": str(Path(base).absolute()), "sha256": _identity(base)}


def base_folder(path: str | Path) -> Path | None:
    """The base of a model folder, None if it holds every parameter itself.

    Raises:
        CheckpointError: the base is not where it was, or is another model now.
    """
    reference = read_model_json(path).get(BASE)
    if reference is None:
        return None
    base = Path(reference["path"])
    if not (base / MODEL_FILE).is_file():
        raise CheckpointError(
            f"{path}: its frozen parameters are in {base}, which is not there; put it back, or correct {BASE}.path in "
            f"{Path(path) / MODEL_FILE}"
        )
    if _identity(base) != reference["sha256"]:
        raise CheckpointError(f"{path}: its base {base} has been replaced by another model; put the old one back")
    return base


def read_params(path: str | Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads the parameters of a model folder, each straight to the dtype and sharding of ``shapes``.

    Paths of the folder that ``shapes`` does not name are not read; those that it lacks come from its base.

    Their files are compared with the sums in the folder while they are read; the first process does so for all.

    Raises:
        CheckpointError: a path is missing in the folder, or has another shape; a file has changed since it was
            written; or the base is missing.
    """
    stored, sums = _open_own_params(path)
    absent = {name: shape for name, shape in shapes.items() if name not in stored}
    if absent and (base := base_folder(path)):
        inherited = read_params(base, absent)
        own = read_params(path, {name: shape for name, shape in shapes.items() if name in stored})
        return {name: inherited[name] if name in inherited else own[name] for name in shapes}
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(shape.shape)}"
        for name, shape in shapes.items()
        if name in stored and tuple(stored[name].shape) != tuple(shape.shape)
    ]
    problems += [
        f"{name} is stored in {np.dtype(stored[name].dtype)}, which is not {np.dtype(shape.dtype)} in other words: the "
        "folder is quantized, or the config is"
        for name, shape in shapes.items()
        if name in stored and is_whole(stored[name].dtype) != is_whole(shape.dtype)
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model: " + "; ".join(problems))
    folder = Path(path).absolute()
    # In the order in which the arrays are read.
    order = sorted(shapes, key=lambda name: -math.prod(shapes[name].shape))
    files = {file: digest for name in order if is_main() for file, digest in sums.get(name, {}).items()}
    wanted = {name: with_sharding(shape) for name, shape in shapes.items()}
    return _compared(folder, files, lambda: read_arrays(folder / PARAMS, wanted, stored), json_from_main)


def open_params(path: str | Path) -> dict[str, Deferred]:
    """Every parameter of a model folder and its base, unread; a stack's layers can be read one by one.

    Raises:
        CheckpointError: not a model folder, or a damaged one; also when a parameter is read whose files have changed
            since they were written.
    """
    base, folder = base_folder(path), Path(path).absolute()
    stored, sums = _open_own_params(path)
    own = {name: _checked(folder, tensor, sums.get(name, {})) for name, tensor in stored.items()}
    return (open_params(base) if base else {}) | own


def _open_own_params(path: str | Path) -> _Stored:
    folder = Path(path).absolute()
    if not (folder / PARAMS).is_dir():
        raise CheckpointError(f"{path}: not a model folder (no {PARAMS}/)")
    # Also for what it finds where a file belongs.
    there, listed = regular_files(folder, folder / PARAMS), read_checksums(folder)
    try:
        stored = open_arrays(folder / PARAMS)
    except Exception as error:  # TensorStore raises whatever it met
        if listed is not None:
            _compared(folder, {name: listed[name] for name in listed if name.startswith(f"{PARAMS}/")})
        raise damaged(folder / PARAMS, error) from error
    if listed is None:
        _say_unchecked(path)
        return _Stored(stored, {})
    for name in sorted({name for name in listed if name.startswith(f"{PARAMS}/")} ^ set(there)):
        problem = f"{SUMS_FILE} does not list {name}" if name in there else f"{name} is missing"
        raise CheckpointError(f"{path}: {problem}; {_REMEDY}")
    sums: dict[str, dict[str, str]] = {name: {} for name in stored}
    others: dict[str, str] = {}
    for name, digest in listed.items():
        # params/ITEM/NAME.OF.ARRAY/FILE; in another layout all arrays share their files.
        parts = name.split("/")
        array = parts[2].replace(".", "/") if parts[0] == PARAMS and len(parts) == 4 else ""
        sums.get(array, others)[name] = digest
    _compared(folder, others)
    return _Stored(stored, sums)


def _compared(
    folder: Path,
    sums: Mapping[str, str],
    read: Callable[[], Any] = lambda: None,
    ask: Callable[[Callable[[], str | None]], str | None] = lambda first: first(),
) -> Any:
    """What ``read`` gives, if the files of ``sums`` are as they were written; both are read at the same time."""
    result: Any = None
    failed: Exception | None = None
    with comparing(folder, sums) as damages:
        try:
            result = read()
        except Exception as error:  # Orbax and TensorStore raise whatever they met
            failed = error
        # What the sums say of a file is clearer.
        first = functools.partial(next, damages, None)
        if (problem := first() if failed else ask(first)) is not None:
            raise CheckpointError(f"{folder}: {problem}; {_REMEDY}") from failed
    if failed is not None:
        raise damaged(folder / PARAMS, failed) from failed
    return result


def _checked(folder: Path, tensor: Deferred, sums: Mapping[str, str]) -> Deferred:
    """A tensor whose files are compared with their sums whenever it is read, a layer's by themselves."""
    rows = tuple(
        _checked(folder, row, {name: sums[name] for name in sums if _is_of_row(name, i)})
        for i, row in enumerate(tensor.rows)
    )
    return Deferred(tensor.shape, tensor.dtype, lambda: _compared(folder, sums, tensor.read), rows)


def _is_of_row(file: str, row: int) -> bool:
    return file.rpartition("/")[2].partition(".")[0] in (str(row), "")  # the latter: .zarray


@functools.cache
def _say_unchecked(path: str | Path) -> None:
    log_main(unchecked(path))


def unchecked(path: str | Path) -> str:
    """The line about a folder that lists no sums."""
    return (
        f"{path}: has no {SUMS_FILE}, so damaged files would not be noticed; add it with "
        f"python -m magma_jax.convert add-checksums {path}"
    )


def _identity(folder: str | Path) -> str:
    # The metadata tells the sources by their hashes, the seed and the config; the parameters follow from these.
    read_model_json(folder)
    return hashlib.sha256((Path(folder) / MODEL_FILE).read_bytes()).hexdigest()


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for whatever a storage layer raised on reading ``folder``, in one line."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"{folder}: cannot be read, probably damaged ({reason:.200}); write it again")


def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding (default: the first device) of an array or a shape."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
