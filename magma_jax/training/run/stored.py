"""Reading a run folder's stored config (``run`` in ``model.json``) into current fields."""

from collections.abc import Mapping
from typing import Any

from magma_jax.config import ConfigError, from_union
from magma_jax.data.datasets import current_fields
from magma_jax.family import Family
from magma_jax.training.run.config import RunConfig, completed, read_run_config


def read_stored_run(family: Family, stored: Mapping[str, Any]) -> RunConfig:
    """The config stored by a run of this or an earlier release.

    Raises:
        ConfigError: a model of another family, or unknown fields.
    """
    where = "model.json: run"
    values = dict(stored)
    if isinstance(values.get("data"), Mapping):
        values["data"] = current_fields(values["data"])
    if isinstance(values.get("optim"), Mapping):
        model = from_union(family.configs, values.get("model") or {}, f"{where}.model")
        values["optim"] = _current_optim(values["optim"], family.roles(model))
    return completed(family, read_run_config(family, values, where))


def _current_optim(stored: Mapping[str, Any], roles: Mapping[str, Any]) -> dict[str, Any]:
    """Converts settings of release 0.1, which had two fixed groups and groups for roles that the model lacks."""
    optim = dict(stored)
    rate = optim.pop("encoder_learning_rate", None)
    if rate is None:
        return optim
    groups = {"rest": {}, "encoder": {"learning_rate": rate}}
    found = optim.get("groups", {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"model.json: run.optim.groups: expected a mapping, got {found!r:.80}")
    optim["groups"] = {role: groups.get(group, group) for role, group in found.items() if role in roles}
    return optim
