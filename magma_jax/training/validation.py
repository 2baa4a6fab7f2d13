"""The loss on samples that the run does not learn from: always the same ones, in the same order, without dropout."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from magma_jax.config import ConfigError
from magma_jax.nn.modules import merge
from magma_jax.runtime.sharding import local_rows, place_batch, replicated
from magma_jax.training.run.setup import Run
from magma_jax.training.step.terms import term_means
from magma_jax.training.step.train_step import TrainState
from magma_jax.typing import Array, Params

Batch = dict[str, np.ndarray]


def make_validation(run: Run, prepare: Callable[[Batch], Batch]) -> Callable[[], dict[str, float]]:
    """Builds the function that returns ``validation_loss`` and the other terms of the run's present state.

    They are the terms of training, such as ``validation_accuracy``, summed over all samples and divided by what they
    count, so that batches of different lengths and mesh shapes do not matter. BatchNorm uses its running statistics.
    With ``validation.ema`` the weights are their moving averages, where these are kept.

    Args:
        prepare: fits a batch to the loss, see ``Family.prepare``.

    Raises:
        ConfigError: the dataset has no such split, or nothing to validate on.
    """
    config, mesh = run.config, run.program.mesh
    # A part of a batch, as the step runs it at once, fits in memory and divides by the devices.
    size = config.batch_size // config.accumulate
    if run.dataset.validation_batches is None:
        raise ConfigError(
            f"validation.every: data of kind {config.data.kind} have no samples to validate on; set it to 0"
        )
    validation = config.validation
    batches = run.dataset.validation_batches(validation.split, validation.samples, size, local_rows(mesh, size))
    loss_function = functools.partial(run.program.family.loss, options=config.loss.for_validation())

    def loss_terms(state: TrainState, frozen: Params, batch: dict[str, Array]):
        weights = state.trainable | (state.averaged_weights() if validation.ema else {})
        model = merge(run.program.graphdef, weights, frozen, state.statistics)
        return loss_function(model, batch, None)

    loss_terms = jax.jit(loss_terms, out_shardings=replicated(mesh))

    def validate() -> dict[str, float]:
        sums = [loss_terms(run.state, run.frozen, place_batch(prepare(batch), mesh, size)) for batch in batches]
        # In float64: fp32 would lose the smaller digits of many batches.
        terms = jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *jax.device_get(sums))
        return {f"validation_{name}": float(mean) for name, mean in term_means(terms).items()}

    return validate
