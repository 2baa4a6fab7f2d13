"""The loss on samples that the run does not learn from: always the same ones, in the same order, without dropout."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.batching import PaddedBatches
from magma_jax.data.batches.pipeline import encode_sample
from magma_jax.data.batches.sources import UnusableSample
from magma_jax.nn.modules import merge
from magma_jax.runtime.distributed import log_main
from magma_jax.runtime.sharding import local_rows, place_batch, replicated
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.setup import Run
from magma_jax.training.step.terms import term_means
from magma_jax.training.step.train_step import TrainState
from magma_jax.typing import IGNORED, Array, Params

Batch = dict[str, np.ndarray]


def make_validation(run: Run, prepare: Callable[[Batch], Batch]) -> Callable[[], dict[str, float]]:
    """Builds the function that returns ``validation_loss`` and the other terms of the run's present state.

    They are the terms of training, such as ``validation_accuracy``, summed over all samples and divided by what they
    count, so that batches of different lengths and mesh shapes do not matter. BatchNorm uses its running statistics.

    Args:
        prepare: fetches the images of a batch, see ``training.image_features``.

    Raises:
        ConfigError: the dataset has no such split.
    """
    config, mesh = run.config, run.program.mesh
    # A part of a batch, as the step runs it at once, fits in memory and divides by the devices.
    size = config.batch_size // config.accumulate
    rows, held_out = local_rows(mesh, size), run.dataset.held_out
    if held_out is None:
        batches = _batches(run, size)
    else:
        batches = held_out(config.validation.split, config.validation.samples, size, rows)
    options = dataclasses.replace(config.loss, batch_norm="frozen")
    loss_function = functools.partial(run.program.family.loss, options=options)

    def loss_terms(state: TrainState, frozen: Params, batch: dict[str, Array]):
        model = merge(run.program.graphdef, state.trainable, frozen, state.statistics)
        return loss_function(model, batch, None)

    loss_terms = jax.jit(loss_terms, out_shardings=replicated(mesh))

    def validate() -> dict[str, float]:
        sums = [loss_terms(run.state, run.frozen, place_batch(prepare(batch), mesh, size)) for batch in batches]
        # In float64: fp32 would lose the smaller digits of many batches.
        terms = jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *jax.device_get(sums))
        return {f"validation_{name}": float(mean) for name, mean in term_means(terms).items()}

    return validate


def chosen_samples(config: RunConfig, evaluation: dict[str, Sequence[Any]]) -> list[Any]:
    """The samples of the dataset that a config validates on, see ``ValidationConfig``.

    Raises:
        ConfigError: the dataset has no such split, or an empty one.
    """
    split, limit = config.validation.split, config.validation.samples
    samples = evaluation.get(split, ())
    if not samples:
        known = ", ".join(name for name, found in evaluation.items() if found)
        raise ConfigError(f"validation.split {split!r}: {config.data.name} has {known or 'no samples to validate on'}")
    rows = np.unique(np.linspace(0, len(samples) - 1, min(limit, len(samples))).astype(int))
    chosen, unusable = [], collections.Counter()
    for row in rows.tolist():
        try:
            chosen.append(samples[row])
        except UnusableSample as error:
            unusable[str(error)] += 1
    if unusable:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in unusable.items())
        log_main(f"validation goes without {unusable.total()} of {len(rows)} samples ({reasons})")
    if not chosen:
        raise ConfigError(f"validation.split {split!r}: none of its samples can be used")
    return chosen


def _batches(run: Run, size: int) -> list[Batch]:
    data, tokenizer = run.config.data, run.dataset.tokenizer
    samples = chosen_samples(run.config, run.dataset.evaluation)
    rows = [
        encode_sample(sample, tokenizer, data.length, overlong=data.overlong, classes=data.classes)
        for sample in samples
    ]
    # The last batch is filled up with rows that count no token.
    filler = {**rows[0], "labels": np.full_like(rows[0]["labels"], IGNORED)}
    rows += [filler] * (-len(rows) % size)
    padded = PaddedBatches(
        grain.MapDataset.source(rows),
        batch_size=size,
        rows=local_rows(run.program.mesh, size),
        buckets=(data.length,),
        pad_id=tokenizer.eos_id,
        seed=0,
    )
    return [padded[i] for i in range(len(padded))]
