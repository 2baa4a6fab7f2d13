"""Model folders: a model's config and all its parameters on disk.

    model.json    config, source, settings of a run
    params/       all parameters, nested dicts for Orbax; an exported folder has model.safetensors instead
    tokenizer/    the vocabulary
    README.md     model card of an exported folder
    SHA256SUMS    checksums of all these files but the card, which may be edited

Reading detects files that have changed. A folder may omit parameters and name in ``model.json`` the folder that holds
them, its base: this lets runs share one frozen language model. A folder is written atomically.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.foreign import ForeignError, read_json
from magma_jax.output import OutputError, object_address, partial_name, whole_output
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
from magma_jax.storage.exported_weights import EXPORTED_FILE, open_exported, read_exported
from magma_jax.storage.objects.copies import local_copy
from magma_jax.typing import Params

MODEL_FILE = "model.json"
PARAMS = "params"
BASE = "base"
# Data from which a conversion reproduces the same PyTorch file.
TORCH_FILE = "torch.json"
BUFFER_FILE = "torch_buffers.npz"
# Files of the checksum list; a run adds others later.
LISTED = (MODEL_FILE, PARAMS, EXPORTED_FILE, "tokenizer", TORCH_FILE, BUFFER_FILE)
CARD_FILE = "README.md"
# Disk space for everything except parameters.
_OTHER_NBYTES = 32 * 2**20


# Remedy for a changed file.
_REMEDY = "put the old file back or write the folder again"


class _Stored(NamedTuple):
    """Lazy parameters of a folder without its base, and the checksums of each parameter's files.

    Those of an exported folder, which has one file for all of them, were compared already.
    """

    arrays: dict[str, Deferred]
    sums: dict[str, dict[str, str]]
    exported: bool = False


def write_model_folder(
    path: str | Path,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    params: Mapping[str, Any],
    write_extras: Callable[[Path], object] = lambda folder: None,
    progress: Callable[[int], None] = lambda nbytes: None,
    write_params: Callable[..., object] | None = None,
) -> None:
    """Writes a model folder atomically: under another name beside ``path``, then renamed.

    All processes must call this. Process 0's parameters are written; the others may pass shapes.

    Args:
        metadata: content of ``model.json``, at least ``model``, the config. A function is called after all parameters
            have been read, so that it can add a hash of their source.
        params: flat dict of all parameters: arrays, or ``Deferred`` that are read during writing, stacks layer by
            layer, so that a model may be larger than memory.
        write_extras: adds files such as the tokenizer.
        progress: called with the number of bytes after each write.
        write_params: ``(folder, params, progress)`` writes the parameters; default: as ``params/``.

    Raises:
        CheckpointError: ``path`` already exists, or the disk is too small.
    """
    path = Path(path).absolute()  # required by Orbax
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
            if write_params is None:
                write_arrays(partial / PARAMS, params, progress)
            else:
                write_params(partial, params, progress)
            write_extras(partial)
            values = metadata() if callable(metadata) else metadata
            (partial / MODEL_FILE).write_text(json.dumps(values, indent=2) + "\n")
            write_checksums(partial, leave_out=(CARD_FILE,))
    except OutputError as error:
        raise CheckpointError(str(error)) from None
    barrier("model folder written")


def nbytes_of(params: Mapping[Any, Any]) -> int:
    """Total size in bytes of arrays or shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in params.values())


def in_dtype(shapes: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes with another floating dtype; quantized integers and their scales (``nn.quantized``) keep theirs."""

    def changes(path: str, leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and not path.endswith("/weight_scale")

    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))
        if changes(path, leaf)
        else leaf
        for path, leaf in shapes.items()
    }


def is_whole(dtype: Any) -> bool:
    """Whether a dtype is an integer type."""
    return np.issubdtype(np.dtype(dtype), np.integer)


def read_model_json(path: str | Path) -> dict[str, Any]:
    """Metadata of a model folder.

    Raises:
        CheckpointError: the folder or its ``model.json`` is missing, unreadable, or has changed since it was written.
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


def base_reference(base: str | Path, folder: str | Path, local: Path) -> dict[str, str]:
    """Entry ``BASE`` of ``model.json`` of ``folder``: paths and identity of the base folder.

    The path relative to ``folder`` holds where both are moved together; there is none if one is in object storage.

    Args:
        base: path or address of the base.
        folder: path or address of the folder that refers to it.
        local: where the base can be read: ``local_copy(base)``, which callers have already.
    """
    address = object_address(base)
    if address is not None:
        return {"path": address, "sha256": _identity(local)}
    base = Path(base).absolute()
    if object_address(folder) is not None:
        return {"path": str(base), "sha256": _identity(base)}
    relative = os.path.relpath(base, Path(folder).absolute())
    return {"path": str(base), "relative": Path(relative).as_posix(), "sha256": _identity(base)}


def base_folder(path: str | Path) -> Path | None:
    """Base of a model folder; None if the folder holds every parameter.

    Raises:
        CheckpointError: the base is missing, or was replaced by another model.
    """
    reference = read_model_json(path).get(BASE)
    if reference is None:
        return None
    base = local_copy(reference["path"])
    # Folders of earlier releases have no relative path.
    if "relative" in reference and (Path(path) / reference["relative"] / MODEL_FILE).is_file():
        base = Path(os.path.normpath(Path(path).absolute() / reference["relative"]))  # TensorStore takes no ".."
    if not (base / MODEL_FILE).is_file():
        raise CheckpointError(
            f"{path}: its frozen parameters are in {reference['path']}, which is not there; put it back, or correct "
            f"{BASE}.path in {Path(path) / MODEL_FILE}"
        )
    if _identity(base) != reference["sha256"]:
        raise CheckpointError(f"{path}: its base {base} has been replaced by another model; put the old one back")
    return base


def read_params(path: str | Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Reads the parameters of a model folder directly into the dtypes and shardings of ``shapes``.

    Only the paths of ``shapes`` are read; those that the folder lacks come from its base. Process 0 compares the files
    with their checksums during reading.

    Raises:
        CheckpointError: a path is missing or has another shape, a file has changed since it was written, or the base
            is missing.
    """
    stored, sums, exported = _open_own_params(path)
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
    # Hashed in the order in which the arrays are read.
    order = sorted(shapes, key=lambda name: -math.prod(shapes[name].shape))
    files = {file: digest for name in order if is_main() for file, digest in sums.get(name, {}).items()}
    wanted = {name: with_sharding(shape) for name, shape in shapes.items()}
    if exported:
        return _compared(folder, {}, lambda: read_exported(stored, wanted))
    return _compared(folder, files, lambda: read_arrays(folder / PARAMS, wanted, stored), json_from_main)


def open_params(path: str | Path) -> dict[str, Deferred]:
    """Lazy parameters of a model folder and its base; the layers of a stack can be read one at a time.

    Raises:
        CheckpointError: not a model folder, or a damaged one. Reading a parameter raises it too if its files have
            changed since they were written.
    """
    base, folder = base_folder(path), Path(path).absolute()
    stored, sums, _ = _open_own_params(path)
    own = {name: _checked(folder, tensor, sums.get(name, {})) for name, tensor in stored.items()}
    return (open_params(base) if base else {}) | own


def _open_own_params(path: str | Path) -> _Stored:
    folder = Path(path).absolute()
    if not (folder / PARAMS).is_dir():
        if (folder / EXPORTED_FILE).exists():
            return _open_exported(path)
        raise CheckpointError(f"{path}: not a model folder (no {PARAMS}/)")
    # Also rejects links, pipes and devices.
    there, listed = regular_files(folder, folder / PARAMS), read_checksums(folder)
    try:
        stored = open_arrays(folder / PARAMS)
    except Exception as error:  # TensorStore raises errors of many types
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
        # params/ITEM/NAME.OF.ARRAY/FILE; in other layouts all arrays share files.
        parts = name.split("/")
        array = parts[2].replace(".", "/") if parts[0] == PARAMS and len(parts) == 4 else ""
        sums.get(array, others)[name] = digest
    _compared(folder, others)
    return _Stored(stored, sums)


def _open_exported(path: str | Path) -> _Stored:
    folder = Path(path).absolute()
    regular_files(folder, folder / EXPORTED_FILE)  # rejects links, pipes and devices
    listed = read_checksums(folder)
    if listed is None:
        _say_unchecked(path)
    elif EXPORTED_FILE not in listed:
        raise CheckpointError(f"{path}: {SUMS_FILE} does not list {EXPORTED_FILE}; {_REMEDY}")
    sums = {} if listed is None else {EXPORTED_FILE: listed[EXPORTED_FILE]}
    # Every process compares: the file is read whole by each of them anyway.
    return _Stored(_compared(folder, sums, lambda: open_exported(folder)), {}, exported=True)


def _compared(
    folder: Path,
    sums: Mapping[str, str],
    read: Callable[[], Any] = lambda: None,
    ask: Callable[[Callable[[], str | None]], str | None] = lambda first: first(),
) -> Any:
    """Returns the result of ``read`` after comparing the files of ``sums``, which are hashed concurrently."""
    result: Any = None
    failed: Exception | None = None
    with comparing(folder, sums) as damages:
        try:
            result = read()
        except Exception as error:  # Orbax and TensorStore raise errors of many types
            failed = error
        # A checksum mismatch is a clearer message than the reader's error.
        first = functools.partial(next, damages, None)
        if (problem := first() if failed else ask(first)) is not None:
            raise CheckpointError(f"{folder}: {problem}; {_REMEDY}") from failed
    if failed is not None:
        raise damaged(folder / PARAMS, failed) from failed
    return result


def _checked(folder: Path, tensor: Deferred, sums: Mapping[str, str]) -> Deferred:
    """Wraps a tensor so that each read, of the whole or of one layer, compares its files with their checksums."""
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
    """Notice for a folder without checksums."""
    return (
        f"{path}: has no {SUMS_FILE}, so damaged files would not be noticed; add it with "
        f"python -m magma_jax.convert add-checksums {path}"
    )


def _identity(folder: str | Path) -> str:
    # The metadata holds the hashes of the sources, the seed and the config, which determine the parameters.
    read_model_json(folder)
    return hashlib.sha256((Path(folder) / MODEL_FILE).read_bytes()).hexdigest()


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """One-line CheckpointError for any exception of a storage library while reading ``folder``."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"{folder}: cannot be read, probably damaged ({reason:.200}); write it again")


def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """``ShapeDtypeStruct`` of an array or a shape, with its sharding (default: the first device)."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
