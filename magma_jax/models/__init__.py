"""Model families, one file each, found by the ``kind`` of their config."""

from typing import TypeAlias

from magma_jax.models.gptj import GPTJ, GPTJConfig
from magma_jax.models.magma import MagmaConfig, MagmaModel

ModelConfig: TypeAlias = MagmaConfig | GPTJConfig

MODELS = {"magma": MagmaModel, "gptj": GPTJ}

__all__ = ["GPTJ", "MODELS", "GPTJConfig", "MagmaConfig", "MagmaModel", "ModelConfig"]
