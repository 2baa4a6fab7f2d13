"""Actions between steps: validation, checkpoints, and the decision to stop."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from magma_jax.runtime.distributed import log_main
from magma_jax.training.checkpoints.bucket_checkpoints import BucketCheckpoints
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints, Snapshot
from magma_jax.training.faults.interruption import StopRequest
from magma_jax.training.run.setup import Run
from magma_jax.typing import PRNGKey


class Milestones:
    """Validates, saves and decides whether to stop; called after every step in every process.

    Args:
        run: its ``state`` is validated and saved; its ``best`` and ``interrupted`` are updated.
        key: root random key.
        position: returns the position of the data iterator.
        checkpoints: checkpoints of the run folder.
        stop: stop request, polled after every step.
        validate: returns ``validation_loss`` and other metrics of ``run.state``; None without validation.
        record: called with a step and its metrics.
        pause: returns a context whose time is excluded from step times.
        settle: raises if the steps so far must not be kept; called before each save.
    """

    def __init__(
        self,
        run: Run,
        key: PRNGKey,
        position: Callable[[], dict[str, Any]],
        checkpoints: RunCheckpoints | BucketCheckpoints,
        stop: StopRequest,
        validate: Callable[[], dict[str, float]] | None,
        record: Callable[[int, Mapping[str, float]], None],
        pause: Callable[[], AbstractContextManager[None]],
        settle: Callable[[], None],
    ):
        self._run, self._key, self._position = run, key, position
        self._checkpoints, self._stop, self._validate = checkpoints, stop, validate
        self._record, self._pause, self._settle = record, pause, settle

    def begin(self, step: int) -> bool:
        """Whether a run continues after ``step`` finished steps."""
        # A run interrupted when a validation was due has not run it.
        if step and self._validation_is_due(step):
            self._validate_now(step)
        return step < self._run.config.steps and not self._run_dry()

    def after(self, step: int) -> bool:
        """Validates and saves if due after ``step``; returns whether the run continues."""
        run, config = self._run, self._run.config
        self._checkpoints.check()
        last = step == config.steps
        run.interrupted = self._stop.reached(step) and not last
        # Schedulers allow little time after a signal, so the validation is left to the next start.
        due = self._validation_is_due(step) and not run.interrupted
        improved = due and self._validate_now(step)
        goes_on = not (last or run.interrupted or self._run_dry())
        if improved or not goes_on or step % config.checkpoint_every == 0:
            self._settle()
            with self._pause():
                self._checkpoints.save(Snapshot(run.state, self._key, self._position(), run.best))
        return goes_on

    def _validation_is_due(self, step: int) -> bool:
        every, steps = self._run.config.validation.every, self._run.config.steps
        return bool(every) and (step % every == 0 or step == steps) and self._run.best.validated < step

    def _validate_now(self, step: int) -> bool:
        """Validates; returns whether this is the best step so far."""
        run, config = self._run, self._run.config.validation
        assert self._validate is not None  # set if a validation can be due
        with self._pause():
            figures = self._validate()
        loss = figures["validation_loss"]
        run.best = run.best.after(step, loss, config.min_delta)
        improved = run.best.step == step
        waited = f"best {run.best.loss:.4f} at step {run.best.step}" if run.best.step else "no best step yet"
        log_main(f"step {step}: validation loss {loss:.4f}, {'the best so far' if improved else waited}")
        self._record(step, figures)
        if run.best.exhausts(config):
            log_main(f"ends early: no improvement in {config.patience} validations; {waited}")
        return improved

    def _run_dry(self) -> bool:
        return self._run.best.exhausts(self._run.config.validation)
