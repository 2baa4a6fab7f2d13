"""Language models by ``kind``, all built by ``models.language.decoder.Decoder``.

A new kind takes one import and one member of ``LanguageModelConfig``.
"""

from typing import TypeAlias

from magma_jax.models.language.gemma import GEMMA2_SIZES, GEMMA3_SIZES, Gemma2Config, Gemma3Config
from magma_jax.models.language.gpt2 import GPT2_SIZES, GPT2Config
from magma_jax.models.language.gpt_neo import GPT_NEO_SIZES, GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPT_NEOX_SIZES, GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.language.llama import (
    LLAMA_SIZES,
    MISTRAL_SIZES,
    SMOLLM3_SIZES,
    LlamaConfig,
    MistralConfig,
    SmolLM3Config,
)
from magma_jax.models.language.olmo2 import OLMO2_SIZES, Olmo2Config
from magma_jax.models.language.opt import OPT_SIZES, OPTConfig
from magma_jax.models.language.phi3 import PHI3_SIZES, Phi3Config
from magma_jax.models.language.qwen import QWEN2_SIZES, QWEN3_SIZES, Qwen2Config, Qwen3Config

LanguageModelConfig: TypeAlias = (
    GPTJConfig
    | GPT2Config
    | GPTNeoConfig
    | GPTNeoXConfig
    | OPTConfig
    | LlamaConfig
    | MistralConfig
    | SmolLM3Config
    | Qwen2Config
    | Qwen3Config
    | Gemma2Config
    | Gemma3Config
    | Olmo2Config
    | Phi3Config
)

# Published sizes by their names on the Hugging Face hub.
PUBLISHED_LANGUAGE_MODELS: dict[str, LanguageModelConfig] = {
    "EleutherAI/gpt-j-6b": GPTJConfig(vocab_rows=50400),
    **GPT2_SIZES,
    **GPT_NEO_SIZES,
    **GPT_NEOX_SIZES,
    **OPT_SIZES,
    **LLAMA_SIZES,
    **MISTRAL_SIZES,
    **SMOLLM3_SIZES,
    **QWEN2_SIZES,
    **QWEN3_SIZES,
    **GEMMA2_SIZES,
    **GEMMA3_SIZES,
    **OLMO2_SIZES,
    **PHI3_SIZES,
}
