"""The compiled program of a run: its model without weights, the sharding of every array, and the jitted step.

The training loop and the ahead-of-time plan both use it, so the planned program is the one that runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from magma_jax.config import ConfigError
from magma_jax.family import Family
from magma_jax.nn.modules import Definition, spared_by_decay, split, variable_types
from magma_jax.runtime.compile import compiler_options
from magma_jax.runtime.sharding import (
    BATCH_AXES,
    batch_sharding,
    batch_shards,
    on_mesh,
    parameter_shardings,
    placed,
    replicated,
    tree_shardings,
)
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.training.step.ema import averaged_paths
from magma_jax.training.step.optim import label_parameters, make_optimizer, partition
from magma_jax.training.step.train_step import TrainState, init_state, make_train_step
from magma_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's step, and the shardings of its inputs and outputs.

    Attributes:
        labels: label of every parameter, see ``training.step.optim.label_parameters``.
        averaged: paths of the parameters with a moving average, see ``training.step.ema``.
        params: every parameter as a ``jax.ShapeDtypeStruct`` with its sharding.
        state: the train state, likewise.
        frozen: the frozen part of ``params``.
        step: jitted ``(state, frozen, batch, key) -> (state, metrics)``; the state is donated, every array of
            ``batch`` has its rows over ``slice``, ``data`` and ``fsdp``, ``key`` and metrics are replicated.
    """

    family: Family
    config: RunConfig
    mesh: Mesh
    graphdef: Definition
    labels: dict[str, str]
    averaged: frozenset[str]
    optimizer: optax.GradientTransformation
    params: Params
    state: TrainState
    frozen: Params
    step: Callable[..., Any]

    def init_state(self, params: Params) -> TrainState:
        """The state before the first step, from ``params`` of the whole model."""
        trainable, _, statistics = partition(params, self.labels)
        # Jitted, so that moments are created with their shardings and the state is committed to its devices like every
        # later state: an uncommitted one would compile the step a second time.
        create = functools.partial(init_state, optimizer=self.optimizer, averaged=self.averaged)
        return jax.jit(create, out_shardings=_shardings(self.state))(trainable, statistics)


def build_program(family: Family, config: RunConfig, mesh: Mesh) -> Program:
    """Builds the program of a config on a mesh; allocates and compiles nothing.

    Raises:
        ConfigError: the batch cannot be split evenly, or data and model do not fit.
    """
    config = completed(family, config)
    parts = batch_shards(mesh) * config.accumulate
    if config.batch_size % parts:
        axes = " x ".join(f"mesh.{name}" for name in BATCH_AXES)
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {parts} "
            f"({axes} = {batch_shards(mesh)}, accumulate {config.accumulate})"
        )
    model = nnx.eval_shape(functools.partial(create_model, family, config))
    graphdef, shapes = split(model)
    labels, averaged = _labels(config, model)
    optimizer = make_optimizer(config.optim, labels, spared_by_decay(model))

    trainable, frozen, statistics = partition(shapes, labels)
    over_fsdp = config.mesh.frozen == "sharded"
    frozen = placed(frozen, parameter_shardings(frozen, mesh, family.shardings, over_fsdp=over_fsdp))
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer, averaged=averaged), trainable, statistics)
    state = placed(state, tree_shardings(state, mesh, family.shardings))

    loss = functools.partial(family.loss, options=config.loss)
    step = jax.jit(
        on_mesh(make_train_step(graphdef, loss, optimizer, accumulate=config.accumulate, ema=config.ema), mesh),
        in_shardings=(_shardings(state), _shardings(frozen), batch_sharding(mesh), replicated(mesh)),
        out_shardings=(_shardings(state), replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    params = {path: {**state.trainable, **frozen, **state.statistics}[path] for path in shapes}
    return Program(
        family=family,
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        labels=labels,
        averaged=averaged,
        optimizer=optimizer,
        params=params,
        state=state,
        frozen=frozen,
        step=step,
    )


def _labels(config: RunConfig, model: nnx.Module) -> tuple[dict[str, str], frozenset[str]]:
    """The group of every parameter, and the paths that are averaged."""
    try:
        labels = label_parameters(variable_types(model), config.optim.groups)
        return labels, averaged_paths(config.ema, labels)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def fresh_params(family: Family, config: RunConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Fresh parameters for the paths of ``shapes``, created with their shardings; the same values on every mesh."""

    def create() -> Params:
        params = split(create_model(family, config))[1]
        return {path: params[path] for path in shapes}

    # Under jit only returned values are computed: pretrained parts are not initialised first.
    return jax.jit(create, out_shardings=_shardings(dict(shapes)))()


def create_model(family: Family, config: RunConfig) -> nnx.Module:
    """The model of a config with fresh weights."""
    return family.build(config.model, nnx.Rngs(config.seed))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
