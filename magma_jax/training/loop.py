"""The training loop: batches, steps, progress, checkpoints. It knows no model family and no data set by name."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from magma_jax.sharding import place_batch, replicated
from magma_jax.training.checkpoint import RunCheckpoints, Snapshot
from magma_jax.training.config import RunConfig
from magma_jax.training.nonfinite import NonfiniteGuard
from magma_jax.training.pictures import picture_loader
from magma_jax.training.setup import Run, prepare_run, say
from magma_jax.typing import PRNGKey

METRICS_FILE = "metrics.jsonl"

Batch = dict[str, np.ndarray]


def train(config: RunConfig, workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Run:
    """Trains, on all devices or those given, or goes on where the run folder's newest checkpoint ends.

    Raises:
        ConfigError: the folder holds a run of another config, or the config does not fit the devices.
        FloatingPointError: a loss or gradient is not finite, see ``training.nonfinite``.
    """
    run = prepare_run(config, workdir, devices)
    batches = iter(run.dataset.batches(config.batch_size, config.seed))
    key = jax.device_put(jax.random.key(config.seed), replicated(run.program.mesh))
    with RunCheckpoints(run.workdir, writing=True, keep=config.keep_checkpoints) as checkpoints:
        if checkpoints.latest_step() is not None:
            snapshot = checkpoints.restore(run.state, key)
            run.state, key = snapshot.state, snapshot.key
            batches.set_state(snapshot.data)
            say(f"resuming after step {int(run.state.step)}")
        prepare = picture_loader(run.dataset.images, run.program, run.params)
        _steps(run, batches, key, prepare, checkpoints)
    return run


def _steps(
    run: Run,
    batches: Iterator[Batch],
    key: PRNGKey,
    prepare: Callable[[Batch], Batch],
    checkpoints: RunCheckpoints,
) -> None:
    config, mesh = run.config, run.program.mesh
    guard = NonfiniteGuard(config.nonfinite, config.nonfinite_limit, run.workdir, key, say)
    first, truncated = int(run.state.step), 0
    started = time.perf_counter()
    metrics_file = (run.workdir / METRICS_FILE).open("a")
    # disable=None: a bar on a terminal, nothing elsewhere, where the lines of metrics tell instead.
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=None)
    with metrics_file, bar:
        for step in range(first, config.steps):
            batch = prepare(next(batches))
            truncated += int(batch.pop("truncated", np.zeros(())).sum())
            run.state, metrics = run.program.step(run.state, run.frozen, place_batch(batch, mesh), key)
            guard.watch(step, metrics.pop("nonfinite"), batch)
            bar.update()
            checkpoints.check()
            done = step + 1
            logged = done % config.log_every == 0 or done == config.steps
            saved = done % config.checkpoint_every == 0 or done == config.steps
            if logged or saved:
                guard.check()
            if logged:
                values = {name: float(value) for name, value in metrics.items()}
                values["skipped_steps"] = guard.skipped
                if config.data.overlong == "truncate":
                    values["truncated_samples"] = truncated
                elapsed = time.perf_counter() - started
                values["samples_per_second"] = (done - first) * config.batch_size / elapsed
                metrics_file.write(json.dumps({"step": done, "seconds": elapsed, **values}) + "\n")
                metrics_file.flush()
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['samples_per_second']:.0f} samples/s")
                if bar.disable:
                    left = (config.steps - done) * elapsed / (done - first)
                    say(
                        f"step {done}/{config.steps}  loss {values['loss']:.3f}  "
                        f"{values['samples_per_second']:.0f} samples/s  {left:.0f} s left"
                    )
            if saved:
                checkpoints.save(Snapshot(run.state, key, batches.get_state()))
