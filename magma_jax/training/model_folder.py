"""Model folders: a model's config and all its parameters on disk.

    model.json    config, source, settings of a run
    params/       every parameter, written by Orbax as nested dicts
    tokenizer/    the vocabulary

A folder appears under its final name only when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from magma_jax.nn.modules import Params, nest

MODEL_FILE = "model.json"
PARAMS = "params"


class CheckpointError(ValueError):
    """A folder that is missing, incomplete or not what it should be; one line with the remedy."""


def write_model_folder(
    path: str | Path,
    metadata: Mapping[str, Any],
    params: Params,
    write_extras: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a model folder: builds it under a temporary name beside ``path``, then renames it.

    Args:
        metadata: goes to ``model.json``; holds at least ``model``, the config.
        params: flat dict of all parameters.
        write_extras: adds files such as the tokenizer to the temporary folder.

    Raises:
        CheckpointError: something already stands at ``path``.
    """
    path = Path(path).absolute()  # Orbax takes no other
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{path}: already exists and is not an empty folder; choose another name or remove it first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        (temporary / MODEL_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        ocp.save(temporary / PARAMS, nest(as_jax(params)))
        write_extras(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def read_params(path: str | Path, shapes: Mapping[str, jax.ShapeDtypeStruct], *, keep_dtype: bool = False) -> Params:
    """Reads the parameters of a model folder, each straight to the dtype and sharding of ``shapes``.

    Paths of the folder that ``shapes`` does not name are not read. With ``keep_dtype`` the stored dtypes stay.

    Raises:
        CheckpointError: a path is missing in the folder, or has another shape.
    """
    folder = Path(path).absolute() / PARAMS
    if not folder.is_dir():
        raise CheckpointError(f"{path}: not a model folder (no {PARAMS}/)")
    try:
        stored = _flatten(ocp.metadata(folder).metadata)
    except Exception as error:  # Orbax raises whatever its storage layer met
        raise damaged(folder, error) from error
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(shape.shape)}"
        for name, shape in shapes.items()
        if name in stored and tuple(stored[name].shape) != tuple(shape.shape)
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model: " + "; ".join(problems))
    placeholders = {name: ocp.PLACEHOLDER for name in stored if name not in shapes}
    wanted = {name: with_sharding(stored[name] if keep_dtype else shape) for name, shape in shapes.items()}
    try:
        loaded = _flatten(ocp.load(folder, nest(placeholders | wanted)))
    except Exception as error:
        raise damaged(folder, error) from error
    return {name: loaded[name] for name in shapes}


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for whatever a storage layer raised on reading ``folder``, in one line."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"{folder}: cannot be read, probably damaged ({reason:.200}); write it again")


def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array or a shape; default: the first device."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def as_jax(tree: Any) -> Any:
    """``tree`` with every leaf on a device, as Orbax saves it."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
