"""Handling of a loss or gradient that is not finite.

Such a step leaves parameters, optimizer and statistics unchanged (``training.step.train_step``), so late detection does
no harm. The host checks each step after the next one has been dispatched, so the device is never idle while it waits.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from magma_jax.output import replace_file
from magma_jax.typing import PRNGKey

FOLDER = "nonfinite"
# Image batches are large, and the first ones are the most informative.
MAX_DUMPS = 10

Policy = Literal["stop", "skip"]


class NonfiniteGuard:
    """Watches the steps of a run; ``skipped`` counts those that changed nothing.

    Args:
        policy: ``stop`` at the first such step, or ``skip`` it and continue.
        limit: maximum number of consecutive steps that ``skip`` may skip.
        workdir: the run folder; batches are written to ``nonfinite/`` below it.
        key: the run's random key; that of a step is ``fold_in(key, step)``.
        say: function that logs a line.
    """

    def __init__(self, policy: Policy, limit: int, workdir: Path, key: PRNGKey, say: Any):
        self.policy, self.limit, self.folder, self.say = policy, limit, workdir / FOLDER, say
        self._key = np.asarray(jax.random.key_data(key))
        self.skipped = 0
        self._in_a_row = 0
        self._pending: tuple[int, jax.Array, Mapping[str, np.ndarray]] | None = None

    def watch(self, step: int, nonfinite: jax.Array, batch: Mapping[str, np.ndarray]) -> None:
        """Registers a step (0, 1, ...) that was dispatched with ``batch``, and checks the previous one.

        Raises:
            FloatingPointError: as ``check``.
        """
        nonfinite.copy_to_host_async()
        self.check()
        self._pending = step, nonfinite, batch

    def check(self) -> None:
        """Waits for the last registered step and checks it; call this before its results are saved.

        Raises:
            FloatingPointError: it was not finite, and the policy ends the run.
        """
        if self._pending is None:
            return
        (step, nonfinite, batch), self._pending = self._pending, None
        if not int(nonfinite):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        where = self._dump(step, batch)
        what = f"step {step + 1}: loss or gradient is not finite; {where}"
        if self.policy == "stop":
            raise FloatingPointError(f"{what}; lower optim.learning_rate, or leave such steps out with nonfinite=skip")
        if self._in_a_row > self.limit:
            raise FloatingPointError(
                f"{what}; it is number {self._in_a_row} in a row, and nonfinite_limit is {self.limit}: "
                "lower optim.learning_rate and start from an earlier checkpoint"
            )
        self.say(f"{what}; left out, number {self._in_a_row} in a row and {self.skipped} since the start")

    def _dump(self, step: int, batch: Mapping[str, np.ndarray]) -> str:
        """Writes the batch, the step and its key; returns a message that says where."""
        self.folder.mkdir(exist_ok=True)
        process = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.folder / f"step_{step + 1:06d}{process}.npz"
        if len(list(self.folder.glob(f"*{process}.npz"))) >= MAX_DUMPS and not path.exists():
            return f"its batch is not written, {self.folder} holds {MAX_DUMPS} already"
        key = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(jnp.asarray(self._key)), step))
        # NumPy's file format has no bfloat16.
        arrays: dict[str, Any] = {
            name: np.asarray(a, np.float32) if a.dtype.kind == "V" else a for name, a in batch.items()
        }
        file = io.BytesIO()
        np.savez(file, **arrays, step=step, key=key)
        replace_file(path, file.getvalue())
        return f"its batch is in {path}"
