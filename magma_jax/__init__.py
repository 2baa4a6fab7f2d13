"""MAGMA in JAX/Flax: a frozen language model that sees, through an image prefix and adapters."""

from magma_jax.data.images import ImageInput
from magma_jax.inference.api import Magma
from magma_jax.models.magma import MagmaConfig, MagmaModel
from magma_jax.version import __version__

__all__ = ["ImageInput", "Magma", "MagmaConfig", "MagmaModel", "__version__"]
