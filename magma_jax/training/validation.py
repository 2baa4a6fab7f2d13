"""Validation loss: on the same held-out samples every time, in the same order, without dropout."""

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
    """Builds the function that returns ``validation_loss`` and the other terms for the run's current state.

    They are the training terms, such as ``validation_accuracy``, summed over all samples and divided by their counts,
    so that batch lengths and mesh shapes do not matter. BatchNorm uses its running statistics. With ``validation.ema``
    averaged weights are replaced by their moving averages.

    Args:
        run: the run whose ``state`` is validated.
        prepare: prepares a batch for the loss, see ``Family.prepare``.

    Raises:
        ConfigError: the dataset has no such split, or nothing to validate on.
    """
    config, mesh = run.config, run.program.mesh
    # The size of one accumulated part, which fits in memory and divides evenly over the devices.
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
        # In float64, since fp32 sums over many batches lose precision.
        terms = jax.tree.map(lambda *parts: np.sum(parts, dtype=np.float64), *jax.device_get(sums))
        return {f"validation_{name}": float(mean) for name, mean in term_means(terms).items()}

    return validate
