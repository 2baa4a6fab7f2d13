"""Language models by ``kind``, all built by ``models.language.decoder.Decoder``.

A new kind takes one import and one member of ``LanguageModelConfig``.
"""

from typing import TypeAlias

from magma_jax.models.language.gpt2 import GPT2_SIZES, GPT2Config
from magma_jax.models.language.gpt_neo import GPT_NEO_SIZES, GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPT_NEOX_SIZES, GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig

LanguageModelConfig: TypeAlias = GPTJConfig | GPT2Config | GPTNeoConfig | GPTNeoXConfig

# Published sizes by their names on the Hugging Face hub.
PUBLISHED_LANGUAGE_MODELS: dict[str, LanguageModelConfig] = {
    "EleutherAI/gpt-j-6b": GPTJConfig(vocab_rows=50400),
    **GPT2_SIZES,
    **GPT_NEO_SIZES,
    **GPT_NEOX_SIZES,
}
