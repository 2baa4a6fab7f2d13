"""Checkpoints of a run: the model folder of the frozen base, written once, and the state that training changes.

    checkpoints/STEP/params/       trainable parameters and running statistics
                     optimizer/    optimizer state, step, root random key
                     average/      moving averages of weights, if the run keeps them
                     progress/     position of the data iterator, best validated step
                     SHA256SUMS    checksums of all these files

A step gets its final name only once it is complete. Orbax is used only here and in ``array_files``.
"""

import abc
import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint.experimental.v1 as ocp

from magma_jax.config import from_dict
from magma_jax.foreign import read_json
from magma_jax.output import OutputError, raise_if_full
from magma_jax.runtime.distributed import json_from_main, log_main
from magma_jax.storage.array_files import open_item
from magma_jax.storage.checksums import find_damage, write_checksums
from magma_jax.storage.model_folder import CheckpointError, open_params, read_model_json, read_params, with_sharding
from magma_jax.training.checkpoints.early_stopping import BestStep
from magma_jax.training.checkpoints.first_release import is_of_first_release, read_optimizer
from magma_jax.training.checkpoints.run_lock import RunLock
from magma_jax.training.step.ema import EmaConfig, averaged_paths
from magma_jax.training.step.optim import label_parameters, partition
from magma_jax.training.step.train_step import TrainState
from magma_jax.typing import Params, PRNGKey

CHECKPOINTS = "checkpoints"
AVERAGE = "average"

# Orbax's suffix of a step that is not complete yet.
_PARTIAL = ".orbax-checkpoint-tmp"

# Orbax writes these after the checksums, when it gives the folder its final name.
WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")


def read_trained_params(
    path: str | Path, shapes: Mapping[str, Any], types: Mapping[str, Any], *, ema: bool | None = None
) -> Params:
    """Parameters of a model folder, or of a run folder at its ``RunCheckpoints.result_step``.

    Each is read directly in the dtype and sharding of ``shapes``.

    Args:
        path: model folder or run folder.
        shapes: shape, dtype and sharding of every parameter to read.
        types: variable types of the parameters.
        ema: as for ``read_what_was_trained``.
    """
    trained = read_what_was_trained(path, shapes, types, ema=ema)
    base = read_params(path, {name: shape for name, shape in shapes.items() if name not in trained})
    return {name: trained[name] if name in trained else base[name] for name in shapes}


def open_trained_params(
    path: str | Path, shapes: Mapping[str, Any], types: Mapping[str, Any], *, ema: bool | None = None
) -> dict[str, Any]:
    """As ``read_trained_params``, in the stored dtypes: lazy, but for what a run has trained.

    Raises:
        CheckpointError: not such a folder, a damaged one, or one that lacks a path of ``shapes``.
    """
    params = open_params(path) | read_what_was_trained(path, shapes, types, ema=ema)
    if misfits := [name for name in shapes if name not in params or params[name].shape != shapes[name].shape]:
        raise CheckpointError(f"{path}: does not fit its config in {', '.join(misfits[:5])}; write it again")
    return {name: params[name] for name in shapes}


def read_what_was_trained(
    path: str | Path, shapes: Mapping[str, Any], types: Mapping[str, Any], *, ema: bool | None = None
) -> Params:
    """Trained parameters and statistics of a run folder's result step; empty for a model folder.

    Args:
        path: run folder or model folder.
        shapes: shape, dtype and sharding of every parameter.
        types: variable types of the parameters.
        ema: whether to read the moving averages instead of the weights; None for whichever was validated.

    Raises:
        CheckpointError: ``ema`` is true and the folder keeps no averages.
    """
    metadata, has_steps = read_model_json(path), (Path(path) / CHECKPOINTS).is_dir()
    run = metadata.get("run") or {}
    if ema and not (has_steps and run.get("ema")):
        raise CheckpointError(f"{path}: keeps no moving averages of weights; leave the option ema out")
    if not has_steps:
        return {}
    labels = label_parameters(types, metadata.get("groups", {}))
    trainable, _, statistics = partition(dict(shapes), labels)
    averaged: frozenset[str] = frozenset()
    if run.get("ema") and (run.get("validation", {}).get("ema", False) if ema is None else ema):
        averaged = averaged_paths(from_dict(EmaConfig, run["ema"], "model.json: run.ema"), labels)
    with RunCheckpoints(path) as checkpoints:
        return checkpoints.restore_params(trainable, statistics, averaged)


@dataclasses.dataclass
class Snapshot:
    """Everything a run needs to continue, apart from its frozen parameters.

    Attributes:
        state: train state.
        key: root random key.
        data: position of the data iterator, plain JSON values. With several processes that of the first is saved, so
            it must count the samples of all of them.
        best: the best validated step so far.
    """

    state: TrainState
    key: PRNGKey
    data: dict[str, Any]
    best: BestStep = BestStep()


T = TypeVar("T")


class SavesInBackground(abc.ABC):
    """Context of a run's checkpoints: its end waits for a save in progress."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # otherwise the first error is the one to report
                raise

    @abc.abstractmethod
    def close(self) -> None:
        """Waits for a save in progress and releases the folder.

        Raises:
            CheckpointError: that save failed.
        """


class RunCheckpoints(SavesInBackground):
    """The checkpoints of a run folder: the newest ones and that of the best validated step.

    A step whose files have changed since they were written is damaged. The one before is used instead, with a line
    on stderr; a writer moves damaged steps to ``STEP.damaged``, a reader leaves the folder unchanged.

    Args:
        workdir: the run folder.
        writing: whether steps are saved; a run folder has one writer (which may be many processes), see
            ``training.checkpoints.run_lock``.
        keep: number of newest steps to keep.

    Raises:
        CheckpointError: another process writes this run.
    """

    def __init__(self, workdir: str | Path, *, writing: bool = False, keep: int = 2):
        self._folder = Path(workdir).absolute() / CHECKPOINTS
        self._writing = writing
        self._kept = _KeptStep()
        self._saving: ocp.AsyncResponse[bool] | None = None
        self._saving_step = 0
        self._lock = _lock(Path(workdir)) if writing else None
        try:
            self._checkpointer = self._open(writing, keep)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _open(self, writing: bool, keep: int) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        context = checkpoint_context()
        # Despite its name this is called before the folder gets its final name, and by the first process only. Orbax
        # deep-copies its options, so a bound method would bring a copy of this object.
        context.async_options.post_finalization_callback = lambda: self._write_checksums()
        return ocp.training.Checkpointer(
            str(self._folder),
            context=context,
            # Orbax's policies do not match its own protocol's annotation.
            preservation_policy=policies.AnyPreservationPolicy(  # pyright: ignore[reportArgumentType]
                [policies.LatestN(keep), self._kept]
            ),
            # Removes half-written steps of a killed run; a reader must not touch what a trainer is writing.
            cleanup_tmp_directories=writing,
        )

    def latest_step(self) -> int | None:
        """The newest step, complete or damaged; None if there is none."""
        return max(self._steps(), default=None)

    def save(self, snapshot: Snapshot) -> None:
        """Copies the snapshot to the host, then writes it in the background; waits for the previous save.

        Raises:
            CheckpointError: the previous save has failed, or another process has taken over the folder.
        """
        step, contents = int(snapshot.state.step), items_of(snapshot)
        self._kept.step = snapshot.best.step
        self._finish_save()
        if (other := json_from_main(lambda: self._lock.lost_to() if self._lock else None)) is not None:
            raise CheckpointError(f"{self._folder}: taken over by {other}; this process stops without saving")
        self._saving_step = step
        self._saving = self._checkpointer.save_checkpointables_async(step, contents, force=True)

    def check(self) -> None:
        """Raises the error of a failed background save; does not wait for one in progress."""
        if self._saving is not None and not self._checkpointer.is_saving_in_progress():
            self._finish_save()

    def restore(self, state: TrainState, key: PRNGKey) -> Snapshot:
        """The newest complete step, in the dtypes and shardings of ``state`` and ``key``, whatever mesh wrote it.

        Raises:
            CheckpointError: there is none.
        """
        wanted: dict[str, Any] = {
            "params": _abstract({"trainable": state.trainable, "statistics": state.statistics}),
            "optimizer": _abstract(_optimizer_part(state, key)),
            "progress": None,
        }
        wanted |= {AVERAGE: _abstract(state.average)} if state.average else {}
        _, loaded = self._load(self._steps(), wanted)
        optimizer, progress = loaded["optimizer"], loaded["progress"]
        key = jax.random.wrap_key_data(optimizer.pop("key"), impl=jax.random.key_impl(key))
        snapshot = Snapshot(
            state=TrainState(**loaded["params"], **optimizer, average=loaded.get(AVERAGE, {})),
            key=key,
            data=progress["data"],
            best=BestStep(**progress["best"]),
        )
        self._kept.step = snapshot.best.step
        return snapshot

    def restore_params(self, trainable: Params, statistics: Params, averaged: Collection[str] = ()) -> Params:
        """Trained parameters and statistics of ``result_step``; moving averages for the paths ``averaged``."""
        wanted: dict[str, Any] = {"params": _abstract({"trainable": trainable, "statistics": statistics})}
        wanted |= {AVERAGE: _abstract({path: trainable[path] for path in averaged})} if averaged else {}
        loaded = self._load([self.result_step()], wanted)[1]
        return loaded["params"]["trainable"] | loaded["params"]["statistics"] | loaded.get(AVERAGE, {})

    def result_step(self) -> int:
        """The step that is the run's result: the best validated one, or the newest if none was validated.

        Raises:
            CheckpointError: there is none.
        """
        step, loaded = self._load(self._steps(), {"progress": None}, checked=("params", "progress"))
        best = loaded["progress"]["best"]["step"]
        if best is None or best not in self._steps():
            return step
        problem = json_from_main(lambda: self._find_damage(best, ("params",)))
        self._report({} if problem is None else {best: problem}, step)
        return best if problem is None else step

    def close(self) -> None:
        """As in ``SavesInBackground``."""
        try:
            self._finish_save()
        finally:
            try:
                self._checkpointer.close()
            finally:
                if self._lock is not None:
                    self._remove_partial_steps(self._lock)
                    self._lock.release()

    def _remove_partial_steps(self, lock: RunLock) -> None:
        """Removes the leftovers of failed saves; no save may be in progress."""
        if lock.lost_to() is None:
            for partial in self._folder.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _finish_save(self) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as error:  # any error of the storage layer, such as a full disk
            with contextlib.suppress(Exception):
                self._checkpointer.wait()  # Orbax raises the same error once per thread
            folder = self._folder / str(self._saving_step)
            try:
                raise_if_full(folder, error)
            except OutputError as full:
                raise CheckpointError(f"{full}; the step before is whole, and the run continues from it") from error
            raise CheckpointError(f"{folder}: could not be saved ({short_reason(error)})") from error

    def _write_checksums(self) -> None:
        # Under its temporary name, which begins with the step and a dot.
        (folder,) = self._folder.glob(f"{self._saving_step}{_PARTIAL}*")
        write_checksums(folder, leave_out=WRITTEN_LAST)

    def _steps(self) -> list[int]:
        """Every step that has a folder, even if Orbax no longer considers it finished; newest first."""

        def look() -> list[int]:
            return sorted((int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()), reverse=True)

        return json_from_main(look)

    def _load(
        self, steps: Sequence[int], wanted: dict[str, Any], checked: Sequence[str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The first of ``steps`` that is undamaged (in the items ``checked``), and its values for ``wanted``."""
        damage: dict[int, str] = {}
        for step in steps:
            problem = json_from_main(lambda step=step: self._find_damage(step, checked or tuple(wanted)))
            if problem is None:
                try:
                    self._check(step, wanted)
                    loaded = self._read(step, wanted)
                except Exception as error:  # Orbax passes on any error of its storage layer
                    problem = short_reason(error)
                    if jax.process_count() > 1:  # other processes may have succeeded and would wait for this one
                        raise CheckpointError(f"{self._folder / str(step)}: cannot be read ({problem})") from error
                else:
                    self._report(damage, step)
                    return step, loaded
            damage[step] = problem
        if not damage:
            raise CheckpointError(f"{self._folder}: holds no checkpoint")
        found = "; ".join(f"{step}: {problem}" for step, problem in damage.items())
        raise CheckpointError(f"{self._folder}: every checkpoint is damaged ({found}); begin in another folder")

    def _read(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        folder = self._folder / str(step) / "optimizer"
        if "optimizer" not in wanted or not is_of_first_release(folder):
            return self._checkpointer.load_checkpointables(step, dict(wanted))
        rest = {item: tree for item, tree in wanted.items() if item != "optimizer"}
        loaded = self._checkpointer.load_checkpointables(step, rest)
        return {**loaded, "optimizer": read_optimizer(folder, wanted["optimizer"])}

    def _check(self, step: int, wanted: Mapping[str, Any]) -> None:
        """Raises if arrays claim a size too large to read, or if the progress is malformed."""
        for item in wanted:
            folder = self._folder / str(step) / item
            if item != "progress":
                open_item(folder)
                continue
            content = read_json(folder / "data.json")
            if not isinstance(content["data"], dict):
                raise TypeError("progress/data.json holds no position in the data")
            from_dict(BestStep, content["best"], "best")

    def _find_damage(self, step: int, items: Sequence[str]) -> str | None:
        if all(known.step != step for known in self._checkpointer.checkpoints):
            return "not marked as finished"
        return find_damage(self._folder / str(step), below=items)

    def _report(self, damage: Mapping[int, str], used: int) -> None:
        for step, problem in damage.items():
            folder = self._folder / str(step)
            moved = ""
            if self._writing:
                aside = json_from_main(lambda folder=folder: _move_aside(folder))
                moved = f", moved to {aside}"
            log_main(f"{folder}: damaged ({problem}){moved}; using {self._folder / str(used)}")
        if damage and self._writing:
            self._checkpointer.reload()


def items_of(snapshot: Snapshot) -> dict[str, Any]:
    """The items of a step by name, for Orbax."""
    state = snapshot.state
    items: dict[str, Any] = {
        "params": _as_jax({"trainable": state.trainable, "statistics": state.statistics}),
        "optimizer": _as_jax(_optimizer_part(state, snapshot.key)),
        "progress": {"data": dict(snapshot.data), "best": snapshot.best.to_json()},
    }
    return items | ({AVERAGE: _as_jax(state.average)} if state.average else {})


def checkpoint_context() -> ocp.Context:
    """Orbax's options for steps."""
    logging.getLogger("absl").addFilter(_is_wanted)
    context = ocp.Context()
    context.checkpointables_options.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="progress"
    )
    return context


@dataclasses.dataclass
class _KeptStep:
    """Preservation policy that keeps one step regardless of its age."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _lock(workdir: Path) -> RunLock | None:
    """The lock of the run folder, held by the first process for all processes of the run."""
    lock = None

    def take() -> str | None:
        nonlocal lock
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(workdir)
        except CheckpointError as error:
            return str(error)
        return None

    if (problem := json_from_main(take)) is not None:
        raise CheckpointError(problem)
    return lock


def _is_wanted(record: logging.LogRecord) -> bool:
    """Log filter for Orbax, which logs a failed save five times before it raises the error, and every thread's notice
    of a signal that stops several processes; the run reports each in one line."""
    reported = record.exc_info or "preemption sync point" in str(record.msg)
    return not (reported and "orbax" in record.pathname)


def _optimizer_part(state: TrainState, key: PRNGKey) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": jax.random.key_data(key)}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(with_sharding, tree)


def short_reason(error: Exception) -> str:
    """The first line of an error."""
    return f"{next(iter(str(error).splitlines()), type(error).__name__):.200}"


def _move_aside(folder: Path) -> str:
    names = [f"{folder.name}.damaged", *(f"{folder.name}.damaged-{i}" for i in range(2, 1000))]
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    os.rename(folder, aside)
    return str(aside)


def _as_jax(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf), tree)
