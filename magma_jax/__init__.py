"""MAGMA in JAX/Flax: a frozen language model with an image prefix and adapters."""

import importlib
from typing import TYPE_CHECKING, Any

from magma_jax.version import __version__

if TYPE_CHECKING:
    from magma_jax.data.images import ImageInput
    from magma_jax.families.cm3leon.generator import CM3Leon
    from magma_jax.families.magma.generator import Magma
    from magma_jax.families.magvlt.generator import Magvlt
    from magma_jax.models.magma import MagmaConfig, MagmaModel

__all__ = ["CM3Leon", "ImageInput", "Magma", "MagmaConfig", "MagmaModel", "Magvlt", "__version__"]

# Imported on first access, so that commands without a model do not wait for JAX.
_HOMES = {
    "CM3Leon": "magma_jax.families.cm3leon.generator",
    "ImageInput": "magma_jax.data.images",
    "Magma": "magma_jax.families.magma.generator",
    "MagmaConfig": "magma_jax.models.magma",
    "MagmaModel": "magma_jax.models.magma",
    "Magvlt": "magma_jax.families.magvlt.generator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
