"""Checkpoints of a run in object storage, in the layout of ``checkpoint``.

A bucket has no renames, so that a step has its final name from the start and is whole once it has its checksums, which
are written last, by the first process, from what the bucket then holds. A step without them is removed by the next
writer. Every process writes its shards to the bucket, and reads from a copy on its own disk.

Orbax writes to Cloud Storage. For S3 it writes to the disk, from where the step is uploaded; this takes one process.
"""

import contextlib
import re
import tempfile
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from magma_jax.output import OutputError, raise_if_full
from magma_jax.runtime.distributed import is_main, json_from_main, log_main
from magma_jax.runtime.ending import abandon_threads
from magma_jax.storage.checksums import SUMS_FILE, checksums_text
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.storage.objects.copies import WorkingCopy
from magma_jax.storage.objects.store import Store, StoreError
from magma_jax.training.checkpoints.bucket_lock import BucketLock
from magma_jax.training.checkpoints.checkpoint import (
    CHECKPOINTS,
    WRITTEN_LAST,
    RunCheckpoints,
    SavesInBackground,
    Snapshot,
    checkpoint_context,
    items_of,
    short_reason,
)
from magma_jax.training.step.train_step import TrainState
from magma_jax.typing import PRNGKey

# Addresses to which Orbax writes arrays.
_BY_ORBAX = "gs://"
_STEP = re.compile(r"(\d+)/")


class BucketCheckpoints(SavesInBackground):
    """The checkpoints of a run folder in a bucket, for the run that writes them; see ``checkpoint.RunCheckpoints``.

    Args:
        copy: working copy of the run folder, whose other files are uploaded before a step becomes whole.
        keep: number of newest steps to keep, beside that of the best validation.

    Raises:
        CheckpointError: another process writes this run, the bucket cannot be written, or several processes have one of
            S3.
    """

    def __init__(self, copy: WorkingCopy, *, keep: int = 2):
        if jax.process_count() > 1 and not copy.address.startswith(_BY_ORBAX):
            raise CheckpointError(f"{copy.address}: several processes can save to {_BY_ORBAX} or a shared disk only")
        self._copy, self._keep = copy, keep
        self._store = Store(f"{copy.address}/{CHECKPOINTS}")
        self._saving: threading.Thread | None = None
        self._saving_step = 0
        self._error: BaseException | None = None
        self._best: int | None = None
        self._lock: BucketLock | None = None
        self._steps: list[int] = []  # whole steps, newest first
        begun = json_from_main(self._begin)
        if isinstance(begun, str):
            raise CheckpointError(begun)
        self._steps = begun

    def _begin(self) -> list[int] | str:
        """Takes the lock and removes unfinished steps, in the first process; returns the whole ones, or a problem."""
        try:
            self._lock = BucketLock(self._copy.store)
            names = self._store.entries()
            steps = {int(match[1]) for name in names if (match := _STEP.match(name))}
            whole = {step for step in steps if f"{step}/{SUMS_FILE}" in names}
            self._remove(steps - whole)
        except (CheckpointError, StoreError) as error:
            if self._lock is not None:
                self._lock.release()
            return str(error)
        return sorted(whole, reverse=True)

    def latest_step(self) -> int | None:
        """The newest whole step; None if there is none."""
        return self._steps[0] if self._steps else None

    def restore(self, state: TrainState, key: PRNGKey) -> Snapshot:
        """The newest undamaged step, as ``RunCheckpoints.restore``.

        Raises:
            CheckpointError: there is none.
        """
        damage = []
        for step in list(self._steps):
            with tempfile.TemporaryDirectory(prefix="magma_jax-") as folder:
                run = Path(folder)
                names = self._store.entries(str(step))
                self._store.download({name: run / CHECKPOINTS / name for name in names})
                try:
                    with RunCheckpoints(run) as checkpoints:
                        snapshot = checkpoints.restore(state, key)
                except CheckpointError as error:
                    problem = str(error).partition("(")[2].rpartition(")")[0].removeprefix(f"{step}: ")
                    damage.append(f"{self._store.address}/{step}: damaged ({problem or error})")
                    continue
            for line in damage:
                log_main(f"{line}; using {self._store.address}/{step}")
            # Damaged steps are newer than this one; they are overwritten when the run comes to them.
            self._steps = [other for other in self._steps if other <= step]
            self._best = snapshot.best.step
            return snapshot
        raise CheckpointError(
            f"{'; '.join(damage)}; every checkpoint is damaged; begin in another folder"
            if damage
            else f"{self._store.address}: holds no checkpoint"
        )

    def save(self, snapshot: Snapshot) -> None:
        """Copies the snapshot to the host, then writes it in the background; waits for the previous save.

        Raises:
            CheckpointError: the previous save has failed, or another process has taken over the folder.
        """
        step, items = int(snapshot.state.step), items_of(snapshot)
        self._finish_save()
        if (other := json_from_main(lambda: self._lock.lost_to() if self._lock else None)) is not None:
            raise CheckpointError(f"{self._store.address}: taken over by {other}; this process stops without saving")
        self._best, self._saving_step = snapshot.best.step, step
        disk = None
        if not self._store.address.startswith(_BY_ORBAX):
            disk = tempfile.TemporaryDirectory(prefix="magma_jax-")
        try:
            json_from_main(lambda: self._remove([step]))
            with checkpoint_context():
                target = self._store.address if disk is None else disk.name
                response = ocp.save_checkpointables_async(f"{target}/{step}", items)
        except Exception as error:  # any error of the storage layer
            if disk is not None:
                disk.cleanup()
            raise self._failed(error) from error
        self._saving = threading.Thread(target=self._complete, args=(response, step, disk), name="save", daemon=True)
        self._saving.start()

    def check(self) -> None:
        """Raises the error of a failed background save; does not wait for one in progress."""
        if self._saving is not None and not self._saving.is_alive():
            self._finish_save()

    def close(self) -> None:
        """As in ``SavesInBackground``."""
        try:
            self._finish_save()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _complete(self, response: Any, step: int, disk: tempfile.TemporaryDirectory[str] | None) -> None:
        """Waits for Orbax, uploads the run's other files, and makes the step whole; in a thread."""
        try:
            with disk or contextlib.nullcontext():
                response.result()
                if disk is not None:
                    root = Path(disk.name)
                    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
                    self._store.upload(files)
            self._copy.upload()
            if is_main():
                self._write_checksums(step)
            self._steps = sorted({step, *self._steps}, reverse=True)
        except BaseException as error:
            self._error = error
            return
        kept = {*self._steps[: self._keep], self._best}
        with contextlib.suppress(StoreError):  # what is left is removed after the next save
            if is_main():
                self._remove([other for other in self._steps if other not in kept])
            self._steps = [other for other in self._steps if other in kept]

    def _write_checksums(self, step: int) -> None:
        names = [name for name in self._store.entries(str(step)) if Path(name).name not in WRITTEN_LAST]
        digests = {name.partition("/")[2]: digest for name, digest in self._store.sha256(names).items()}
        self._store.write(f"{step}/{SUMS_FILE}", checksums_text(digests).encode())

    def _finish_save(self) -> None:
        if self._saving is None:
            return
        self._saving.join()
        self._saving = None
        error, self._error = self._error, None
        if error is not None:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> CheckpointError:
        # TensorStore's threads go on trying to write to a lost bucket, and Python would wait for them at the end.
        abandon_threads()
        place = f"{self._store.address}/{self._saving_step}"
        last = next((step for step in self._steps if step != self._saving_step), None)
        whole = f"step {last} is whole, and the run continues from it" if last else "no checkpoint before it is whole"
        try:
            raise_if_full(tempfile.gettempdir(), error)
            reason = short_reason(error) if isinstance(error, Exception) else type(error).__name__
        except OutputError as full:
            reason = str(full)
        return CheckpointError(f"{place}: could not be saved ({reason.removeprefix(f'{place}: ')}); {whole}")

    def _remove(self, steps: Collection[int]) -> None:
        """Removes steps, first what makes them whole."""
        for step in steps:
            names = self._store.entries(str(step))
            self._store.remove([name for name in names if name == f"{step}/{SUMS_FILE}"])
            self._store.remove(list(names))
