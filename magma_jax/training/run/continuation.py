"""Whether a run folder's run may be continued with a config, and what the config becomes then."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError, to_dict
from magma_jax.family import Family
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.run.config import RunConfig, completed, read_run_config
from magma_jax.training.step.optim import make_schedule

# What may differ between two parts of one run, since it leaves the parameters as they are but for rounding: how long
# it is, what is watched, and how devices share the work.
MAY_CHANGE = (
    "steps",
    "evaluate",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "watch",
    "validation.every",
    "validation.patience",
    "validation.min_delta",
    "nonfinite",
    "nonfinite_limit",
    "mesh",
    "accumulate",
    "loss.remat",
    "loss.encoder_remat",
    "data.cache_dir",
    "data.workers",
    "data.max_skipped",
)


def continued_config(
    family: Family, config: RunConfig, workdir: Path, *, resume: bool = True
) -> tuple[RunConfig, list[str]]:
    """The config that goes on with the run in ``workdir``, and lines that say what is unexpected about it.

    The length of the learning rate's schedule is settled when a run starts: other ``steps`` do not stretch it.

    Raises:
        ConfigError: ``resume`` is false, or the folder holds another run, or none of its further steps would learn
            anything.
    """
    stored = read_model_json(workdir).get("run")
    if stored is None:
        raise ConfigError(f"{workdir}: holds a model that was not trained here; choose another --workdir")
    if not resume:
        raise ConfigError(f"{workdir}: holds a run; choose another --workdir, or continue it without --no-resume")
    notes = []
    length = stored["optim"]["steps"]
    if config.optim.steps == config.steps != length == stored["steps"]:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=length))
        notes = [_schedule_note(config, workdir)]
    differing = differences(_with_defaults(family, stored), to_dict(config))
    # With statistics of the batch, the parts that it is run in make a difference.
    fixed = {"accumulate"} if config.loss.batch_norm == "batch" else set()
    differing = {name: pair for name, pair in differing.items() if name in fixed or not _may_change(name)}
    if differing:
        listed = ", ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items())
        raise ConfigError(f"{workdir}: holds a run with another config ({listed:.400}); choose another --workdir")
    return config, notes


def _schedule_note(config: RunConfig, workdir: Path) -> str:
    optim = config.optim
    note = f"the schedule of the learning rates keeps the {optim.steps} steps that the run started with"
    if config.steps <= optim.steps:
        return note
    rates = [float(make_schedule(optim, peak)(config.steps)) for peak in _peaks(config)]
    if not any(rates):
        raise ConfigError(
            f"{workdir}: the run's schedule ({optim.schedule}) has fallen to zero after {optim.steps} steps, so that "
            f"more of them teach nothing; train {config.steps} steps in another --workdir"
        )
    return f"{note}; behind them they stay at {' and '.join(f'{rate:.3g}' for rate in rates)}"


def _peaks(config: RunConfig) -> list[float]:
    encoder = config.optim.groups.get("encoder") == "encoder"
    return [config.optim.learning_rate, *([config.optim.encoder_learning_rate] if encoder else [])]


def _with_defaults(family: Family, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the fields that are younger than the run."""
    try:
        return to_dict(completed(family, read_run_config(family.configs, stored)))
    except ConfigError:  # fields that no longer exist; they will be listed
        return stored


def _may_change(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the values that differ between two nested configs, each with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found
