"""The training loop: batches, steps, progress, checkpoints. It is independent of model families and datasets."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magma_jax.family import Family
from magma_jax.runtime.distributed import log_main
from magma_jax.runtime.sharding import local_rows, place_batch, replicated
from magma_jax.storage.objects.copies import Uploads
from magma_jax.training.checkpoints.bucket_checkpoints import BucketCheckpoints
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints
from magma_jax.training.faults.interruption import StopRequest
from magma_jax.training.faults.nonfinite import NonfiniteGuard
from magma_jax.training.faults.skipped import SkippedSamples
from magma_jax.training.milestones import Milestones
from magma_jax.training.monitor.profiler import StepRange
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.setup import Run, prepare_run
from magma_jax.training.validation import make_validation
from magma_jax.training.watch import Watch
from magma_jax.typing import PRNGKey

Batch = dict[str, np.ndarray]


def train(
    family: Family,
    config: RunConfig,
    workdir: str | Path,
    devices: Sequence[Any] | None = None,
    *,
    resume: bool = True,
    profile: StepRange | None = None,
) -> Run:
    """Trains a run, or resumes it from the run folder's newest checkpoint.

    SIGTERM, or Ctrl-C once, ends it after the current step, with a checkpoint; see ``Run.interrupted``.

    Args:
        family: family of the config's model, see ``magma_jax.families``.
        config: config of the run.
        workdir: run folder; an address such as ``gs://bucket/run`` for one in object storage.
        devices: devices to train on; None for all.
        resume: whether to continue a run in the folder; if False, an existing run is an error.
        profile: steps to trace into the run folder.

    Raises:
        ConfigError: the folder holds a run that may not be continued, or the config does not fit the devices, the data
            or the steps to profile.
        FloatingPointError: a loss or gradient is not finite, see ``training.faults.nonfinite``.
    """
    run = prepare_run(family, config, workdir, devices, resume=resume)
    config, mesh = run.config, run.program.mesh
    batches = iter(run.dataset.batches(config.batch_size, config.seed, local_rows(mesh, config.batch_size)))
    # Created on the mesh: with several processes the step takes no other arrays.
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated(mesh))(config.seed)
    with (
        contextlib.closing(batches),
        StopRequest() as stop,
        Uploads(run.copy),
        _open_checkpoints(run) as checkpoints,
    ):
        if checkpoints.latest_step() is not None:
            snapshot = checkpoints.restore(run.state, key)
            run.state, run.best, key = snapshot.state, snapshot.best, snapshot.key
            batches.set_state(snapshot.data)
            log_main(f"resuming after step {int(run.state.step)}")
        watch = Watch(run, profile)
        prepare = family.prepare(run.program, run.dataset, run.params)
        validate = make_validation(run, prepare) if config.validation.every else None
        with watch:
            _steps(
                run=run,
                batches=batches,
                key=key,
                prepare=prepare,
                validate=validate,
                watch=watch,
                checkpoints=checkpoints,
                stop=stop,
            )
    if run.interrupted:
        step = int(run.state.step)
        log_main(f"{stop.signal}: stopped after step {step} of {config.steps}, which is saved; start again to continue")
    return run


def _open_checkpoints(run: Run) -> RunCheckpoints | BucketCheckpoints:
    if run.copy is not None:
        return BucketCheckpoints(run.copy, keep=run.config.keep_checkpoints)
    return RunCheckpoints(run.workdir, writing=True, keep=run.config.keep_checkpoints)


def _steps(
    run: Run,
    batches: Any,  # Grain iterator, which can report its position
    key: PRNGKey,
    prepare: Callable[[Batch], Batch],
    validate: Callable[[], dict[str, float]] | None,
    watch: Watch,
    checkpoints: RunCheckpoints | BucketCheckpoints,
    stop: StopRequest,
) -> None:
    config, mesh = run.config, run.program.mesh
    guard = NonfiniteGuard(config.nonfinite, config.nonfinite_limit, run.workdir, key, log_main)
    milestones = Milestones(
        run=run,
        key=key,
        position=batches.get_state,
        checkpoints=checkpoints,
        stop=stop,
        validate=validate,
        record=watch.write,
        pause=watch.paused,
        settle=guard.check,
    )
    counted = run.dataset.counted
    counts = dict.fromkeys(counted.values(), 0)
    skipped = SkippedSamples(batches, run.workdir, int(run.state.step))
    watch.counts = lambda: {"skipped_steps": guard.skipped, **counts, **skipped.counts()}
    step = int(run.state.step)
    goes_on = milestones.begin(step)
    while goes_on:
        with watch.waiting():
            rows = prepare(next(batches))
            skipped.record(step + 1)
            for array, count in counted.items():
                counts[count] += int(rows.pop(array).sum())
            batch = place_batch(rows, mesh, config.batch_size)
        watch.begin(step + 1, rows)
        run.state, metrics = run.program.step(run.state, run.frozen, batch, key)
        guard.watch(step, metrics.pop("nonfinite"), rows)
        step += 1
        watch.end(step, metrics)
        goes_on = milestones.after(step)
