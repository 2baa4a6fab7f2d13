"""One optimizer step: gradients of trainable parameters, accumulation, update, new running statistics."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from magma_jax.nn.modules import Definition, merge, split
from magma_jax.training.step.ema import EmaConfig, begin_average, move_average
from magma_jax.training.step.terms import Terms, learned_counts, objective, term_means
from magma_jax.typing import Array, Params, PRNGKey

Batch = dict[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that training changes; frozen parameters are passed separately.

    Attributes:
        average: moving averages of weights by path, see ``ema``; empty if none are kept.
    """

    step: Any  # int32 scalar; its shape or sharding in trees of those
    trainable: Params
    statistics: Params
    opt_state: Any
    average: Params = dataclasses.field(default_factory=dict)

    def averaged_weights(self) -> Params:
        """The averages in the dtypes of their weights."""
        return {path: leaf.astype(self.trainable[path].dtype) for path, leaf in self.average.items()}


# (model, batch, key) -> terms of the loss; the key feeds dropout.
LossFunction = Callable[[Any, Batch, PRNGKey], Terms]


def init_state(
    trainable: Params, statistics: Params, optimizer: optax.GradientTransformation, averaged: Collection[str] = ()
) -> TrainState:
    """State before the first step; ``averaged`` are the paths of ``ema.averaged_paths``."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        statistics=statistics,
        opt_state=optimizer.init(trainable),
        average=begin_average(trainable, averaged),
    )


def make_train_step(
    graphdef: Definition,
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema: EmaConfig | None = None,
) -> Callable[[TrainState, Params, Batch, PRNGKey], tuple[TrainState, Metrics]]:
    """Builds ``(state, frozen, batch, root_key) -> (state, metrics)``, to be jitted by the caller.

    With ``accumulate`` = n the batch is run in n parts whose sums, counts and gradients add up to the step of the whole
    batch (except that BatchNorm in batch mode sees the parts). For a loss of several terms the counts of all parts are
    computed before the first gradient, see ``terms``. The key of a step is ``fold_in(root_key, step)``. Metrics: the
    mean of every term, ``loss``, ``grad_norm`` (before clipping), ``nonfinite``.

    A value that the forward pass assigns to a trained parameter (such as a restarted code of a codebook) replaces the
    old one, as running statistics do; the update of the step is added to it.

    With ``ema`` the moving average is updated with the new weights.

    If the loss or the gradient norm is not finite, ``nonfinite`` is 1 and only ``step`` changes.
    """

    def sums(trainable: Params, frozen: Params, statistics: Params, batch: Batch, key: PRNGKey, counts: Any):
        model = merge(graphdef, trainable, frozen, statistics)
        terms = loss_function(model, batch, key)
        updated = split(model)[1]
        total = objective(terms, learned_counts(terms) if counts is None else counts)
        # A parameter that nothing was assigned to is still the object that the model was merged from.
        assigned = {path: updated[path] for path in trainable if updated[path] is not trainable[path]}
        return total, (terms, {path: updated[path] for path in statistics}, assigned)

    def train_step(state: TrainState, frozen: Params, batch: Batch, root_key: PRNGKey):
        key = jax.random.fold_in(root_key, state.step)

        def part(carry, batch, key, counts):
            statistics, assigned = carry
            (_, (terms, statistics, new)), grads = jax.value_and_grad(sums, has_aux=True)(
                state.trainable | assigned, frozen, statistics, batch, key, counts
            )
            return (statistics, assigned | new), (grads, terms)

        def count(batch, key):
            return learned_counts(loss_function(merge(graphdef, state.trainable, frozen, state.statistics), batch, key))

        if accumulate == 1:
            (statistics, assigned), (grads, terms) = part((state.statistics, {}), batch, key, None)
        else:
            # Every n-th row instead of n blocks: a block would be on some devices only and leave the others idle.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = jax.random.split(key, accumulate)
            first = jax.tree.map(lambda x: x[0], parts)
            counts = None
            if len(jax.eval_shape(count, first, keys[0])) > 1:
                counts = _summed(lambda _, inputs: (None, count(*inputs)), None, (parts, keys))[1]
            shapes = jax.eval_shape(
                lambda carry, batch, key: part(carry, batch, key, counts)[0][1],
                (state.statistics, {}),
                first,
                keys[0],
            )
            (statistics, assigned), (grads, terms) = _summed(
                lambda carry, inputs: part(carry, *inputs, counts=counts),
                (state.statistics, {path: state.trainable[path] for path in shapes}),
                (parts, keys),
            )

        divisor = jnp.maximum(next(iter(learned_counts(terms).values())), 1)
        grads = jax.tree.map(lambda g: g / divisor, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = cast(Params, optax.apply_updates(state.trainable | assigned, updates))
        metrics = term_means(terms) | {"grad_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["nonfinite"] = 1 - finite.astype(jnp.int32)
        # On the device, not the host: the state is donated, and a NaN detected later must not destroy it.
        average = state.average if ema is None else move_average(state.average, trainable, ema.decay)
        new = TrainState(
            step=state.step, trainable=trainable, statistics=statistics, opt_state=opt_state, average=average
        )
        kept = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new)
        return dataclasses.replace(kept, step=state.step + 1), metrics

    return train_step


def _summed(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``lax.scan`` that sums the outputs instead of stacking them."""

    def step(state, inputs):
        carry, total = state
        carry, new = body(carry, inputs)
        return (carry, jax.tree.map(jnp.add, total, new)), None

    shapes = jax.eval_shape(body, carry, jax.tree.map(lambda x: x[0], inputs))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, (carry, zeros), inputs)[0]
