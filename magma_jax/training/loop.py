"""The training loop: batches, steps, progress, checkpoints. It knows no model family and no data set by name."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from magma_jax.sharding import place_batch, replicated
from magma_jax.training.checkpoint import RunCheckpoints
from magma_jax.training.config import RunConfig
from magma_jax.training.interruption import StopRequest
from magma_jax.training.milestones import Milestones
from magma_jax.training.nonfinite import NonfiniteGuard
from magma_jax.training.pictures import picture_loader
from magma_jax.training.setup import Run, prepare_run, say
from magma_jax.training.validation import make_validation
from magma_jax.typing import PRNGKey

METRICS_FILE = "metrics.jsonl"

Batch = dict[str, np.ndarray]


def train(
    config: RunConfig, workdir: str | Path, devices: Sequence[jax.Device] | None = None, *, resume: bool = True
) -> Run:
    """Trains, on all devices or those given, or goes on where the run folder's newest checkpoint ends.

    SIGTERM, or Ctrl-C once, ends it after the step at hand, with a checkpoint; see ``Run.interrupted``.

    Args:
        resume: whether a run that is in the folder is continued; if not, it is an error.

    Raises:
        ConfigError: the folder holds a run that may not be continued, or the config does not fit the devices or the
            data.
        FloatingPointError: a loss or gradient is not finite, see ``training.nonfinite``.
    """
    run = prepare_run(config, workdir, devices, resume=resume)
    config = run.config
    batches = iter(run.dataset.batches(config.batch_size, config.seed))
    key = jax.device_put(jax.random.key(config.seed), replicated(run.program.mesh))
    with (
        StopRequest() as stop,
        RunCheckpoints(run.workdir, writing=True, keep=config.keep_checkpoints) as checkpoints,
    ):
        if checkpoints.latest_step() is not None:
            snapshot = checkpoints.restore(run.state, key)
            run.state, run.best, key = snapshot.state, snapshot.best, snapshot.key
            batches.set_state(snapshot.data)
            say(f"resuming after step {int(run.state.step)}")
        prepare = picture_loader(run.dataset.images, run.program, run.params)
        validate = make_validation(run, prepare) if config.validation.every else None
        _steps(run, batches, key, prepare, validate, checkpoints, stop)
    if run.interrupted:
        step = int(run.state.step)
        say(f"{stop.signal}: stopped after step {step} of {config.steps}, which is saved; start again to continue")
    return run


def _steps(
    run: Run,
    batches: Iterator[Batch],
    key: PRNGKey,
    prepare: Callable[[Batch], Batch],
    validate: Callable[[], float] | None,
    checkpoints: RunCheckpoints,
    stop: StopRequest,
) -> None:
    config, mesh = run.config, run.program.mesh
    guard = NonfiniteGuard(config.nonfinite, config.nonfinite_limit, run.workdir, key, say)
    first, truncated = int(run.state.step), 0
    started = time.perf_counter()
    metrics_file = (run.workdir / METRICS_FILE).open("a")
    # disable=None: a bar on a terminal, nothing elsewhere, where the lines of metrics tell instead.
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=None)

    def record(step: int, values: Mapping[str, float]) -> None:
        metrics_file.write(json.dumps({"step": step, **values}) + "\n")
        metrics_file.flush()

    milestones = Milestones(run, key, batches.get_state, checkpoints, stop, validate, record, guard.check)
    with metrics_file, bar:
        goes_on, done = milestones.begin(first), first
        while goes_on:
            batch = prepare(next(batches))
            truncated += int(batch.pop("truncated", np.zeros(())).sum())
            run.state, metrics = run.program.step(run.state, run.frozen, place_batch(batch, mesh), key)
            guard.watch(done, metrics.pop("nonfinite"), batch)
            bar.update()
            done += 1
            if done % config.log_every == 0 or done == config.steps:
                guard.check()
                values = {name: float(value) for name, value in metrics.items()}
                values["skipped_steps"] = guard.skipped
                if config.data.overlong == "truncate":
                    values["truncated_samples"] = truncated
                elapsed = time.perf_counter() - started
                values["samples_per_second"] = (done - first) * config.batch_size / elapsed
                record(done, {"seconds": elapsed, **values})
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['samples_per_second']:.0f} samples/s")
                if bar.disable:
                    left = (config.steps - done) * elapsed / (done - first)
                    say(
                        f"step {done}/{config.steps}  loss {values['loss']:.3f}  "
                        f"{values['samples_per_second']:.0f} samples/s  {left:.0f} s left"
                    )
            goes_on = milestones.after(done)
