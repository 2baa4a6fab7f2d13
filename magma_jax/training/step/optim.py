"""Who learns, and how: one table of roles, schedules by name, and the optimizer of the part that learns.

The role of a parameter is its variable type (``nn.modules``). A config says for each role whether it is ``frozen`` or
belongs to the group ``encoder`` or ``rest``; the groups have their own learning rates. Frozen parameters never enter
the gradient or the optimizer, so they cost neither time nor memory and cannot change.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

from magma_jax.nn.modules import AdapterParam, EncoderParam, HeadParam, LanguageParam, PrefixParam, Statistic
from magma_jax.typing import Params

Group = Literal["frozen", "encoder", "rest"]
Schedule = Callable[[Any], Any]

ROLES: dict[type[nnx.Variable], str] = {
    LanguageParam: "language",
    AdapterParam: "adapter",
    EncoderParam: "encoder",
    PrefixParam: "prefix",
    HeadParam: "head",
    Statistic: "statistic",
}

# Weight decay spares biases and LayerNorms, and nothing else: BatchNorm weights decay (original).
NO_DECAY = re.compile(r"(^|/)(bias|ln(_\w+)?/weight)$")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer; the defaults are the paper's pretraining (appendix A).

    Attributes:
        learning_rate: peak rate of prefix, adapters and head.
        encoder_learning_rate: peak rate of the image encoder.
        schedule: ``cosine`` to ``final_fraction`` of the peak (paper), ``warmup_decay`` and ``warmup`` (the
            original's configs: logarithmic warm-up, then linear to zero or constant), ``constant``.
        steps: length of the schedule in optimizer steps; None for the length of the run.
        warmup_steps: steps of the warm-up; ``cosine`` warms up linearly, by default not at all.
        weight_decay: decoupled (AdamW); see ``NO_DECAY``.
        clip_norm: global norm that gradients are clipped to; 0 for no clipping.
        groups: role to group.
    """

    learning_rate: float = 8e-4
    encoder_learning_rate: float = 2e-6
    schedule: Literal["cosine", "warmup_decay", "warmup", "constant"] = "cosine"
    steps: int | None = None
    warmup_steps: int = 0
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    groups: dict[str, Group] = dataclasses.field(
        default_factory=lambda: {
            "language": "frozen",
            "adapter": "rest",
            "prefix": "rest",
            "head": "rest",
            "encoder": "encoder",
        }
    )

    def __post_init__(self):
        unknown = set(self.groups) - (set(ROLES.values()) - {"statistic"})
        if unknown:
            raise ValueError(f"groups: unknown role {', '.join(sorted(unknown))}")


def label_parameters(types: Mapping[str, type[nnx.Variable]], groups: Mapping[str, str]) -> dict[str, str]:
    """Gives every path its group: ``frozen``, ``encoder``, ``rest``, or ``statistic`` for running averages.

    Raises:
        ValueError: a path whose type no role, or more than one, matches, or whose role has no group.
    """
    labels = {}
    for path, kind in types.items():
        roles = [role for cls, role in ROLES.items() if issubclass(kind, cls)]
        if len(roles) != 1:
            found = f"{len(roles)} roles ({', '.join(roles)})" if roles else "no role"
            raise ValueError(f"parameter {path} of type {kind.__name__} has {found}; see training.step.optim.ROLES")
        role = roles[0]
        if role != "statistic" and role not in groups:
            raise ValueError(f"parameter {path}: its role {role!r} has no group in the optimizer config")
        labels[path] = "statistic" if role == "statistic" else groups[role]
    return labels


def partition(params: Params, labels: Mapping[str, str]) -> tuple[Params, Params, Params]:
    """Splits a flat dict into (trainable, frozen, statistics)."""
    trainable = {path: leaf for path, leaf in params.items() if labels[path] in ("encoder", "rest")}
    frozen = {path: leaf for path, leaf in params.items() if labels[path] == "frozen"}
    statistics = {path: leaf for path, leaf in params.items() if labels[path] == "statistic"}
    return trainable, frozen, statistics


def make_schedule(config: OptimConfig, peak: float) -> Schedule:
    """Learning rate by optimizer step (0, 1, ...), in fp32."""
    warmup, total = config.warmup_steps, config.steps
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        if warmup:
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, end_value=peak * config.final_fraction)
        return optax.cosine_decay_schedule(peak, total, alpha=config.final_fraction)

    def deepspeed(step):
        # DeepSpeed counts from -1, so its first two optimizer steps both run at the minimum rate, zero.
        count = jnp.maximum(step - 1, 0)
        rising = jnp.log(count + 1.0) / math.log(warmup) if warmup > 1 else 1.0
        falling = (total - count) / max(total - warmup, 1) if config.schedule == "warmup_decay" else 1.0
        return peak * jnp.where(count < warmup, rising, jnp.clip(falling, 0.0, 1.0))

    return deepspeed


def make_optimizer(config: OptimConfig, labels: Mapping[str, str]) -> optax.GradientTransformation:
    """The optimizer of the trainable part: clipping by the global norm, then AdamW per group.

    ``labels`` may cover the whole model; frozen paths are not part of the tree the optimizer sees.
    """
    trainable = {path: label for path, label in labels.items() if label in ("encoder", "rest")}
    peaks = {"encoder": config.encoder_learning_rate, "rest": config.learning_rate}

    def adamw(peak: float) -> optax.GradientTransformation:
        return optax.adamw(
            make_schedule(config, peak),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: {path: decays(path) for path in params},
        )

    by_group = optax.multi_transform({group: adamw(peak) for group, peak in peaks.items()}, trainable)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), by_group) if config.clip_norm else by_group


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter."""
    return not NO_DECAY.search(path)
