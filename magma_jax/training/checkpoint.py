"""Checkpoints on disk; the only file that knows Orbax.

Two kinds of folder, both made of plain nested dicts:

    model folder    model.json (config, source), params/ (every parameter), tokenizer/
    run folder      the model folder of the frozen base, written once, and checkpoints/STEP/ with what training
                    changes: trainable parameters, running statistics, optimizer state, step, data iterator

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
from magma_jax.training.optim import label_parameters, partition
from magma_jax.training.step import TrainState

MODEL_FILE = "model.json"
PARAMS = "params"
CHECKPOINTS = "checkpoints"


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
        ocp.save(temporary / PARAMS, nest(_as_jax(params)))
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
        raise _damaged(folder, error) from error
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(shape.shape)}"
        for name, shape in shapes.items()
        if name in stored and tuple(stored[name].shape) != tuple(shape.shape)
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model: " + "; ".join(problems))
    placeholders = {name: ocp.PLACEHOLDER for name in stored if name not in shapes}
    wanted = {name: _with_sharding(stored[name] if keep_dtype else shape) for name, shape in shapes.items()}
    try:
        loaded = _flatten(ocp.load(folder, nest(placeholders | wanted)))
    except Exception as error:
        raise _damaged(folder, error) from error
    return {name: loaded[name] for name in shapes}


def read_trained_params(
    path: str | Path, shapes: Mapping[str, Any], types: Mapping[str, Any], *, keep_dtype: bool = False
) -> Params:
    """Parameters of a model folder, or of a run folder with what its newest checkpoint has trained."""
    if not (Path(path) / CHECKPOINTS).is_dir():
        return read_params(path, shapes, keep_dtype=keep_dtype)
    trainable, frozen, statistics = partition(shapes, label_parameters(types, read_model_json(path).get("groups", {})))
    with RunCheckpoints(path) as checkpoints:
        trained = checkpoints.restore_params(trainable, statistics)
    return read_params(path, frozen, keep_dtype=keep_dtype) | trained


class RunCheckpoints:
    """Checkpoints of a run, ``checkpoints/STEP/``, newest kept."""

    def __init__(self, workdir: str | Path, *, writing: bool = False, keep: int = 2):
        self._checkpointer = ocp.training.Checkpointer(
            Path(workdir).absolute() / CHECKPOINTS,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            # Half-written steps of a killed run; a reader must leave alone what a trainer is writing.
            cleanup_tmp_directories=writing,
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any]) -> None:
        """Saves in the background; ``data_state`` is JSON (the position of the data iterator)."""
        params = {"trainable": state.trainable, "statistics": state.statistics}
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        self._checkpointer.save_checkpointables_async(
            step, {"params": _as_jax(params), "optimizer": _as_jax(optimizer), "data": dict(data_state)}
        )

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest step onto the dtypes and shardings of ``state``; returns it and the data state."""
        params = {"trainable": state.trainable, "statistics": state.statistics}
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        loaded = self._load({"params": _abstract(params), "optimizer": _abstract(optimizer), "data": None})
        return TrainState(**loaded["params"], **loaded["optimizer"]), loaded["data"]

    def restore_params(self, trainable: Params, statistics: Params) -> Params:
        """The trained parameters and statistics of the newest step, for inference."""
        wanted = _abstract({"trainable": trainable, "statistics": statistics})
        loaded = self._load({"params": wanted})["params"]
        return loaded["trainable"] | loaded["statistics"]

    def _load(self, wanted: dict[str, Any]) -> dict[str, Any]:
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self._checkpointer.directory}: holds no checkpoint")
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except Exception as error:  # Orbax raises whatever its storage layer met
            raise _damaged(Path(self._checkpointer.directory) / str(step), error) from error

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a save in progress and closes."""
        self._checkpointer.close()


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(f"{folder}: cannot be read, probably damaged ({reason:.200}); write it again")


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(_with_sharding, tree)


def _as_jax(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat
