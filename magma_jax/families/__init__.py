"""The model families. A new one is a package of its own and one row here."""

from typing import Any

from magma_jax.config import ConfigError, Settings
from magma_jax.families.language import LANGUAGE
from magma_jax.families.magma import MAGMA
from magma_jax.family import Family
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


def run_config(values: Settings, where: str = "config") -> RunConfig:
    """The config of a run, from nested mappings; its model may be of any family.

    Raises:
        ConfigError: an unknown kind of model, or as ``config.from_dict``.
    """
    config = read_run_config([kind for family in FAMILIES.values() for kind in family.configs], values, where)
    return completed(family_of(config.model), config)
