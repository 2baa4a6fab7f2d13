"""Model families, one file each, found by the ``kind`` of their config."""

from typing import TypeAlias

from magma_jax.models.language.catalog import LANGUAGE_MODELS, LanguageModelConfig
from magma_jax.models.language.gptj import GPTJ, GPTJConfig
from magma_jax.models.magma import MagmaConfig, MagmaModel

ModelConfig: TypeAlias = MagmaConfig | LanguageModelConfig

MODELS = {"magma": MagmaModel, **LANGUAGE_MODELS}

__all__ = ["GPTJ", "MODELS", "GPTJConfig", "MagmaConfig", "MagmaModel", "ModelConfig"]
