"""Model folders: a model's config and all its parameters on disk.

    model.json    config, source, settings of a run
    params/       every parameter, nested dicts as Orbax loads them
    tokenizer/    the vocabulary

A folder may lack parameters and say in ``model.json`` which folder has them, its base: so runs share one frozen
language model. A folder appears under its final name only when it is whole.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.output import OutputError, partial_name, whole_output
from magma_jax.runtime.distributed import barrier, is_main
from magma_jax.storage.array_files import open_arrays, read_arrays, write_arrays
from magma_jax.storage.deferred import Deferred
from magma_jax.typing import Params

MODEL_FILE = "model.json"
PARAMS = "params"
BASE = "base"
# Room on the disk for all that is not a parameter.
_OTHER_NBYTES = 32 * 2**20


class CheckpointError(ValueError):
    """A folder that is missing, incomplete or not what it should be; one line with the remedy."""


def write_model_folder(
    path: str | Path,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    params: Mapping[str, Any],
    write_extras: Callable[[Path], None] = lambda folder: None,
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
        CheckpointError: the folder or its ``model.json`` is missing or unreadable.
    """
    file = Path(path) / MODEL_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: not a model folder (no {MODEL_FILE}); give the folder that train.py or convert wrote"
        )
    try:
        metadata = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
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

    Raises:
        CheckpointError: a path is missing in the folder, or has another shape; or the base is missing.
    """
    stored = _open_own_params(path)
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
    folder = Path(path).absolute() / PARAMS
    try:
        return read_arrays(folder, {name: with_sharding(shape) for name, shape in shapes.items()}, stored)
    except Exception as error:  # as Orbax does
        raise damaged(folder, error) from error


def open_params(path: str | Path) -> dict[str, Deferred]:
    """Every parameter of a model folder and its base, unread; a stack's layers can be read one by one.

    Raises:
        CheckpointError: not a model folder, or a damaged one.
    """
    base = base_folder(path)
    return (open_params(base) if base else {}) | _open_own_params(path)


def _open_own_params(path: str | Path) -> dict[str, Deferred]:
    folder = Path(path).absolute() / PARAMS
    if not folder.is_dir():
        raise CheckpointError(f"{path}: not a model folder (no {PARAMS}/)")
    try:
        return open_arrays(folder)
    except Exception as error:  # TensorStore raises whatever it met
        raise damaged(folder, error) from error


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
