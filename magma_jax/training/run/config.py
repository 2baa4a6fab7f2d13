"""Config of a run: the root of every config file."""

import dataclasses
import functools
import operator
from typing import Any

from magma_jax.config import ConfigError, Settings, from_dict
from magma_jax.family import Family
from magma_jax.runtime.sharding import MeshConfig
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.faults.nonfinite import Policy
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.step.ema import EmaConfig
from magma_jax.training.step.optim import OptimConfig, with_groups


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        model: config of the model, of one of the ``families``.
        data: config of the training data, of one of the kinds of ``data.datasets``.
        optim: optimizer, and the group of every role.
        ema: moving averages of weights; None for none.
        loss: options of the loss, of the family's type; None for the defaults.
        mesh: mesh of devices; it may change when a run is resumed.
        base: model folder that the run starts from, such as ``convert compose`` writes, or another run's folder; its
            frozen parameters stay there and are not copied; a path or an address in object storage. None: start from
            ``weights``.
        weights: path prefix to the name of a pretrained part, see ``training.run.pretrained``; the rest starts fresh.
        steps: optimizer steps.
        batch_size: samples per step.
        accumulate: number of parts that a batch is split into, to save memory.
        seed: seed of fresh weights, data order and dropout.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: number of newest checkpoints to keep, beside that of the best validation.
        nonfinite: policy for a loss or gradient that is not finite: ``stop`` the run, or ``skip`` the step, which then
            changes nothing; its batch is written to the run folder.
        nonfinite_limit: maximum number of consecutive skipped steps before the run stops.
        validation: validation schedule and early stopping.
        watch: what is recorded beside ``metrics.jsonl``.
        evaluate: whether the run ends with the evaluation of ``eval.py``.
    """

    model: Any
    data: Any
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig | None = None
    loss: Any = None
    mesh: MeshConfig = MeshConfig()
    base: str | None = None
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    nonfinite: Policy = "stop"
    nonfinite_limit: int = 10
    validation: ValidationConfig = ValidationConfig()
    watch: WatchConfig = WatchConfig()
    evaluate: bool = False

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.nonfinite_limit < 0:
            raise ValueError(f"nonfinite_limit must not be negative, got {self.nonfinite_limit}")
        if self.base and self.weights:
            raise ValueError("base holds the whole model: give either base or weights")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if self.optim.steps is None:
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, steps=self.steps))
        if self.optim.steps and self.optim.warmup_steps >= self.optim.steps:
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} leave nothing of {self.optim.steps} steps")
        if self.validation.ema and self.ema is None:
            raise ValueError("validation.ema needs the averages: set ema.decay")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")


def read_run_config(family: Family, values: Settings, where: str = "config") -> RunConfig:
    """A run config from nested mappings, with model, data and loss of the family's types.

    Raises:
        ConfigError: as ``config.from_dict``.
    """
    types = {
        "model": functools.reduce(operator.or_, family.configs),
        "data": functools.reduce(operator.or_, family.data),
        "loss": family.options | None,
    }
    return from_dict(RunConfig, values, where, types)


def completed(family: Family, config: RunConfig) -> RunConfig:
    """The config with settings that follow from its model, and a group for every role.

    Raises:
        ConfigError: data and model do not fit, or a group for a role that the model lacks.
    """
    if not isinstance(config.data, family.data):
        raise ConfigError(
            f"data.kind {config.data.kind!r}: a model of the family {family.name} learns from "
            f"{', '.join(kind.kind for kind in family.data)}"
        )
    config = dataclasses.replace(config, loss=family.options() if config.loss is None else config.loss)
    try:
        config = dataclasses.replace(config, optim=with_groups(config.optim, family.roles(config.model)))
        return family.complete(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
