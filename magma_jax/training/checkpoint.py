"""Checkpoints of a run: the model folder of the frozen base, written once, and what training changes.

``checkpoints/STEP/`` holds trainable parameters, running statistics, optimizer state, step and data iterator, as plain
nested dicts. Orbax is known here and in ``model_folder`` only. A folder appears under its final name only when it is
whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from magma_jax.nn.modules import Params
from magma_jax.training.model_folder import (
    CheckpointError,
    as_jax,
    damaged,
    read_model_json,
    read_params,
    with_sharding,
)
from magma_jax.training.optim import label_parameters, partition
from magma_jax.training.step import TrainState

CHECKPOINTS = "checkpoints"


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
            step, {"params": as_jax(params), "optimizer": as_jax(optimizer), "data": dict(data_state)}
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
            raise damaged(Path(self._checkpointer.directory) / str(step), error) from error

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a save in progress and closes."""
        self._checkpointer.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(with_sharding, tree)
