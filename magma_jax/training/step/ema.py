"""Exponential moving average of weights, part of the train state; it is less noisy than the weights of a single step.

After every step ``average = decay average + (1 - decay) weight`` in fp32; it starts equal to the weights.
"""

import dataclasses
from collections.abc import Collection, Mapping

import jax.numpy as jnp

from magma_jax.training.step.optim import learns
from magma_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """A moving average of weights.

    Attributes:
        decay: share of the average that a step keeps; its time constant is 1 / (1 - decay) steps.
        roles: roles whose weights are averaged; () for all that learn.
    """

    decay: float
    roles: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {self.decay}")


def averaged_paths(config: EmaConfig | None, labels: Mapping[str, str]) -> frozenset[str]:
    """Paths of the averaged parameters.

    Args:
        config: None for no averages.
        labels: see ``training.step.optim.label_parameters``.

    Raises:
        ValueError: a role that does not learn.
    """
    if config is None:
        return frozenset()
    learning = {label for label in labels.values() if learns(label)}
    idle = [role for role in config.roles if role not in learning]
    if idle:
        raise ValueError(f"ema.roles: {idle[0]!r} does not learn; roles that do: {', '.join(sorted(learning))}")
    chosen = config.roles or learning
    return frozenset(path for path, label in labels.items() if label in chosen)


def begin_average(weights: Params, paths: Collection[str]) -> Params:
    """The average before the first step: copies of the weights at ``paths``."""
    return {path: jnp.array(leaf, jnp.float32, copy=True) for path, leaf in weights.items() if path in paths}


def move_average(average: Params, weights: Params, decay: float) -> Params:
    """The average after a step that resulted in ``weights``."""
    return {path: decay * leaf + (1 - decay) * weights[path].astype(jnp.float32) for path, leaf in average.items()}
