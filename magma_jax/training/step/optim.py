"""Optimizer: parameter groups by role, schedules by name, AdamW for the trainable parameters.

The type of a parameter names its role (``nn.modules``), and a config gives each role a group: ``frozen``, or a learning
rate and a weight decay. Frozen parameters never enter the gradient or the optimizer, so they cost neither time nor
memory and cannot change.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

from magma_jax.nn.modules import Statistic, roles_of
from magma_jax.typing import Params

Schedule = Callable[[Any], Any]

# Labels of parameters that do not learn; the label of a trained parameter is its role.
FROZEN = "frozen"
STATISTIC = "statistic"


@dataclasses.dataclass(frozen=True)
class Group:
    """How the parameters of a role learn.

    Attributes:
        learning_rate: peak of the schedule; None for the optimizer's.
        weight_decay: decoupled weight decay; None for the optimizer's.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None


Groups = Mapping[str, Literal["frozen"] | Group]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer; the defaults are the paper's pretraining (appendix A).

    Attributes:
        learning_rate: peak rate of groups that do not set one.
        schedule: ``cosine`` to ``final_fraction`` of the peak (paper), ``warmup_decay`` and ``warmup`` (the
            original's configs: logarithmic warm-up, then linear to zero or constant), ``constant``.
        steps: length of the schedule in optimizer steps; None for the length of the run.
        warmup_steps: steps of the warm-up; ``cosine`` warms up linearly, by default not at all.
        restarts: optimizer steps, ascending, at which ``cosine`` returns to the peak, see ``make_schedule``.
        final_fraction: share of the peak at which ``cosine`` ends.
        b1: AdamW's decay rate of the mean of gradients.
        b2: AdamW's decay rate of the mean of their squares.
        eps: added by AdamW to the root of that mean.
        weight_decay: decoupled (AdamW), for groups that do not set one; it skips biases and LayerNorm weights, see
            ``nn.modules``.
        clip_norm: global norm that gradients are clipped to; 0 for no clipping.
        groups: role to ``frozen`` or a group; other roles take the family's default.
    """

    learning_rate: float = 8e-4
    schedule: Literal["cosine", "warmup_decay", "warmup", "constant"] = "cosine"
    steps: int | None = None
    warmup_steps: int = 0
    restarts: tuple[int, ...] = ()
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    groups: dict[str, Literal["frozen"] | Group] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.restarts and self.schedule != "cosine":
            raise ValueError(f"optim.restarts belong to the schedule cosine, not to {self.schedule}")
        bounds = (self.warmup_steps, *self.restarts, *(() if self.steps is None else (self.steps,)))
        if self.restarts and any(earlier >= later for earlier, later in itertools.pairwise(bounds)):
            raise ValueError(
                f"optim.restarts {self.restarts} must ascend, after the {self.warmup_steps} steps of the warm-up and "
                f"before the schedule's end after {self.steps} steps"
            )


def with_groups(config: OptimConfig, roles: Groups) -> OptimConfig:
    """The config with a group for every role of a model.

    Args:
        config: optimizer config.
        roles: the model's roles and their default groups.

    Raises:
        ValueError: a group for a role that no parameter of the model has, or no role that learns.
    """
    unused = sorted(config.groups.keys() - roles.keys())
    if unused:
        raise ValueError(
            f"optim.groups.{unused[0]}: no parameter of the model has this role; its roles are {', '.join(roles)}"
        )
    groups = {**roles, **config.groups}
    if all(group == FROZEN for group in groups.values()):
        raise ValueError(f"optim.groups: all roles ({', '.join(groups)}) are frozen, so nothing would learn")
    return dataclasses.replace(config, groups=groups)


def label_parameters(types: Mapping[str, type[nnx.Variable]], groups: Mapping[str, Any]) -> dict[str, str]:
    """Labels every path: ``frozen``, ``statistic`` for running averages, or the role of a trained parameter.

    Raises:
        ValueError: a parameter with no role, several roles, or a role without a group.
    """
    labels = {}
    for path, kind in types.items():
        if issubclass(kind, Statistic):
            labels[path] = STATISTIC
            continue
        roles = sorted(roles_of(kind))
        if len(roles) != 1:
            found = f"{len(roles)} roles ({', '.join(roles)})" if roles else "no role"
            raise ValueError(
                f"parameter {path} of type {kind.__name__} has {found}; its type must name one, as in role = 'head'"
            )
        if roles[0] not in groups:
            raise ValueError(
                f"parameter {path}: its role {roles[0]!r} has no group; name it in the roles of its family"
            )
        labels[path] = FROZEN if groups[roles[0]] == FROZEN else roles[0]
    return labels


def learns(label: str) -> bool:
    """Whether a parameter with this label learns."""
    return label not in (FROZEN, STATISTIC)


def partition(params: Params, labels: Mapping[str, str]) -> tuple[Params, Params, Params]:
    """Splits a flat dict into (trainable, frozen, statistics)."""
    trainable = {path: leaf for path, leaf in params.items() if learns(labels[path])}
    frozen = {path: leaf for path, leaf in params.items() if labels[path] == FROZEN}
    statistics = {path: leaf for path, leaf in params.items() if labels[path] == STATISTIC}
    return trainable, frozen, statistics


def make_schedule(config: OptimConfig, peak: float) -> Schedule:
    """Learning rate by optimizer step (0, 1, ...), in fp32.

    With restarts ``r_1 < r_2 < ...``, ``r_0 = 0`` and the schedule's end as the last one, ``cosine`` gives at a step t
    from r_i on and before r_(i+1) (Loshchilov and Hutter, 2017, equation 5)

        floor + (peak - floor) (1 + cos(pi (t - r_i) / (r_(i+1) - r_i))) / 2,    floor = final_fraction peak

    A warm-up, linear from zero, takes the first steps of the first period, whose cosine is that much shorter.
    """
    warmup, total = config.warmup_steps, config.steps or 0  # a run fills in its length
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        floor = config.final_fraction
        lengths = [end - start for start, end in itertools.pairwise((0, *config.restarts, total))]
        periods = [optax.cosine_decay_schedule(peak, length, alpha=floor) for length in lengths]
        if warmup:
            periods[0] = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, lengths[0], end_value=peak * floor)
        return optax.join_schedules(periods, config.restarts) if config.restarts else periods[0]

    def deepspeed(step):
        # DeepSpeed counts from -1, so its first two steps both have the minimum rate, zero.
        count = jnp.maximum(step - 1, 0)
        rising = jnp.log(count + 1.0) / math.log(warmup) if warmup > 1 else 1.0
        falling = (total - count) / max(total - warmup, 1) if config.schedule == "warmup_decay" else 1.0
        return peak * jnp.where(count < warmup, rising, jnp.clip(falling, 0.0, 1.0))

    return deepspeed


def peak_rates(config: OptimConfig) -> dict[str, float]:
    """Peak rates by metric name: ``learning_rate`` for groups with the default, ``ROLE_learning_rate`` for others."""
    groups = {role: group for role, group in config.groups.items() if isinstance(group, Group)}
    shared = any(group.learning_rate is None for group in groups.values())
    own = {f"{role}_learning_rate": group.learning_rate for role, group in groups.items()}
    return ({"learning_rate": config.learning_rate} if shared else {}) | {
        name: rate for name, rate in own.items() if rate is not None
    }


def make_optimizer(
    config: OptimConfig, labels: Mapping[str, str], spared: Collection[str] = ()
) -> optax.GradientTransformation:
    """The optimizer of trainable parameters: clipping by the global norm, then AdamW with each group's rate and decay.

    Args:
        config: with a group for every role, see ``with_groups``.
        labels: may cover the whole model; the optimizer's tree has no frozen paths.
        spared: paths that weight decay skips, see ``nn.modules.spared_by_decay``.
    """
    # Roles with equal settings share a transformation.
    roles_by_setting: dict[tuple[float, float], list[str]] = {}
    for role in sorted({label for label in labels.values() if learns(label)}):
        group = config.groups[role]
        assert isinstance(group, Group)
        rate = config.learning_rate if group.learning_rate is None else group.learning_rate
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        roles_by_setting.setdefault((rate, decay), []).append(role)

    def adamw(rate: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            make_schedule(config, rate),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=decay,
            # The tree is a flat dict of parameters.
            mask=lambda params: {path: path not in spared for path in params},  # pyright: ignore[reportGeneralTypeIssues]
        )

    names = {role: "-".join(roles) for roles in roles_by_setting.values() for role in roles}
    by_group = optax.multi_transform(
        {"-".join(roles): adamw(*setting) for setting, roles in roles_by_setting.items()},
        {path: names[label] for path, label in labels.items() if learns(label)},
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), by_group) if config.clip_norm else by_group
