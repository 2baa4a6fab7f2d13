"""The language models that a config can name by ``kind``. A new one is one import and one row here.

A language model is a ``models.language.decoder.Decoder``, built as ``LanguageModel(config, mlp_adapter=...,
attn_adapter=..., rngs=...)``.
"""

from typing import TypeAlias

from flax import nnx

from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gpt2 import GPT2, GPT2_SIZES, GPT2Config
from magma_jax.models.language.gpt_neo import GPT_NEO_SIZES, GPTNeo, GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPT_NEOX_SIZES, GPTNeoX, GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJ, GPTJConfig
from magma_jax.nn.adapters import AdapterConfig

LanguageModelConfig: TypeAlias = GPTJConfig | GPT2Config | GPTNeoConfig | GPTNeoXConfig

LANGUAGE_MODELS: dict[str, type[Decoder]] = {"gptj": GPTJ, "gpt2": GPT2, "gpt_neo": GPTNeo, "gpt_neox": GPTNeoX}

# Published sizes by the names of the Hugging Face hub.
PUBLISHED_LANGUAGE_MODELS: dict[str, LanguageModelConfig] = {
    "EleutherAI/gpt-j-6b": GPTJConfig(vocab_rows=50400),
    **GPT2_SIZES,
    **GPT_NEO_SIZES,
    **GPT_NEOX_SIZES,
}


def build_language_model(
    config: LanguageModelConfig,
    *,
    mlp_adapter: AdapterConfig | None = None,
    attn_adapter: AdapterConfig | None = None,
    rngs: nnx.Rngs,
) -> Decoder:
    """The language model of a config, with fresh weights."""
    return LANGUAGE_MODELS[config.kind](config, mlp_adapter=mlp_adapter, attn_adapter=attn_adapter, rngs=rngs)
