"""Resuming a run with a config: which settings may change, and which are kept from the run folder."""

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

# Settings that may change when a run is resumed, since they affect parameters only by rounding: length, monitoring and
# the mesh. ``may_change`` of data and loss add their own.
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
    family: Family, config: RunConfig, workdir: Path, *, resume: bool = True, shown: str | Path | None = None
) -> tuple[RunConfig, list[str]]:
    """The config that resumes the run in ``workdir``, and notes to log about it.

    The length of the learning-rate schedule is fixed when a run starts: other ``steps`` do not stretch it. Messages
    name the folder ``shown``, by default ``workdir``.

    Raises:
        ConfigError: ``resume`` is false, the folder holds another run, or its learning rates have fallen to zero.
    """
    stored, name = read_model_json(workdir).get("run"), shown or workdir
    if stored is None:
        raise ConfigError(f"{name}: holds a model that was not trained here; choose another --workdir")
    if not resume:
        raise ConfigError(f"{name}: holds a run; choose another --workdir, or continue it without --no-resume")
    notes = []
    length = stored["optim"]["steps"]
    if config.optim.steps == config.steps != length == stored["steps"]:
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=length))
        notes = [_schedule_note(config, name)]
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
        raise ConfigError(
            f"{name}: holds a run with another config ({listed:.400}); choose another --workdir, and to start from "
            f"this run's result there add --set base={name}"
        )
    return config, notes


def _schedule_note(config: RunConfig, workdir: str | Path) -> str:
    optim = config.optim
    note = f"the schedule of the learning rates keeps the {optim.steps} steps that the run started with"
    if optim.steps is not None and config.steps <= optim.steps:
        return note
    rates = [float(make_schedule(optim, peak)(config.steps)) for peak in peak_rates(optim).values()]
    if not any(rates):
        raise ConfigError(
            f"{workdir}: the run's schedule ({optim.schedule}) has fallen to zero after {optim.steps} steps, so that "
            f"further steps would change nothing; train {config.steps} steps in another --workdir, which starts from "
            f"this run's result with --set base={workdir}"
        )
    return f"{note}; after them they stay at {' and '.join(f'{rate:.3g}' for rate in rates)}"


def _with_defaults(family: Family, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds fields that are newer than the run."""
    try:
        return to_dict(read_stored_run(family, stored))
    except ConfigError:  # fields that no longer exist; they will be listed
        return stored


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of values that differ between two nested configs, each with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found
