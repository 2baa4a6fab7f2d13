"""The model families. A new one is a package of its own and one row here."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from magma_jax.config import ConfigError
from magma_jax.families.language import LANGUAGE
from magma_jax.families.magma import MAGMA
from magma_jax.family import Family
from magma_jax.foreign import shown
from magma_jax.training.run.config import RunConfig, completed, read_run_config

FAMILIES: dict[str, Family] = {family.name: family for family in (MAGMA, LANGUAGE)}


def family_of(model: Any) -> Family:
    """The family of a model's config.

    Raises:
        ConfigError: no family has models of this type.
    """
    for family in FAMILIES.values():
        if isinstance(model, family.configs):
            return family
    raise ConfigError(f"{type(model).__name__}: no family has such models; there are {', '.join(FAMILIES)}")


def run_config(values: Mapping[str, Any] | ConfigDict, where: str = "config") -> RunConfig:
    """The config of a run, from nested mappings; its model may be of any family.

    Raises:
        ConfigError: an unknown kind of model, or as ``config.from_dict``.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    kinds = {config.kind: family for family in FAMILIES.values() for config in family.configs}
    kind = dict(values.get("model") or {}).get("kind")
    if kind not in kinds:
        raise ConfigError(f"{where}.model.kind: {shown(kind)} is not one of {', '.join(kinds)}")
    return completed(kinds[kind], read_run_config(kinds[kind], values, where))
