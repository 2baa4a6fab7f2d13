"""Whether a run folder's run may be continued with a config, and what the config becomes then."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magma_jax.config import ConfigError, to_dict
from magma_jax.family import Family
from magma_jax.storage.model_folder import read_model_json
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.stored import read_stored_run
from magma_jax.training.step.optim import make_schedule, peak_rates

# What may differ between two parts of one run, since it leaves the parameters as they are but for rounding: how long
# it is, what is watched, and how devices share the work. ``may_change`` of data and loss add their own.
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
    free = {*MAY_CHANGE, *(f"data.{name}" for name in config.data.may_change)}
    free |= {f"loss.{name}" for name in config.loss.may_change}
    if not config.loss.adds_up:
        free.remove("accumulate")
    differing = {
        name: pair
        for name, pair in differing.items()
        if not any(name == one or name.startswith(f"{one}.") for one in free)
    }
    if differing:
        listed = ", ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items())
        raise ConfigError(f"{workdir}: holds a run with another config ({listed:.400}); choose another --workdir")
    return config, notes


def _schedule_note(config: RunConfig, workdir: Path) -> str:
    optim = config.optim
    note = f"the schedule of the learning rates keeps the {optim.steps} steps that the run started with"
    if optim.steps is not None and config.steps <= optim.steps:
        return note
    rates = [float(make_schedule(optim, peak)(config.steps)) for peak in peak_rates(optim).values()]
    if not any(rates):
        raise ConfigError(
            f"{workdir}: the run's schedule ({optim.schedule}) has fallen to zero after {optim.steps} steps, so that "
            f"more of them teach nothing; train {config.steps} steps in another --workdir"
        )
    return f"{note}; behind them they stay at {' and '.join(f'{rate:.3g}' for rate in rates)}"


def _with_defaults(family: Family, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the fields that are younger than the run."""
    try:
        return to_dict(read_stored_run(family, stored))
    except ConfigError:  # fields that no longer exist; they will be listed
        return stored


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
