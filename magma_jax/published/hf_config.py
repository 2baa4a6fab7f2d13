"""Converts a language model's Hugging Face ``config.json`` to our config.

Every field is read, or known not to change the model's function (``published.hf.fields``); unsupported settings and
unknown fields are refused by name.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from magma_jax.config import from_dict
from magma_jax.foreign import ForeignError, read_json, shown
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.gemma import Gemma2Config, Gemma3Config
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.language.llama import LlamaConfig, MistralConfig, SmolLM3Config
from magma_jax.models.language.olmo2 import Olmo2Config
from magma_jax.models.language.opt import OPTConfig
from magma_jax.models.language.phi3 import Phi3Config
from magma_jax.models.language.qwen import Qwen2Config, Qwen3Config
from magma_jax.published.hf import gated, older
from magma_jax.published.hf.fields import Fields, LanguageModelError

# By ``model_type``, which equals our config's ``kind``: config class, and conversion of ``config.json`` to its fields.
CONFIGS: dict[str, tuple[type[LanguageModelConfig], Callable[[Fields], dict[str, Any]]]] = {
    "gptj": (GPTJConfig, older.gptj),
    "gpt2": (GPT2Config, older.gpt2),
    "gpt_neo": (GPTNeoConfig, older.gpt_neo),
    "gpt_neox": (GPTNeoXConfig, older.gpt_neox),
    "opt": (OPTConfig, older.opt),
    "llama": (LlamaConfig, gated.llama),
    "mistral": (MistralConfig, gated.mistral),
    "smollm3": (SmolLM3Config, gated.smollm3),
    "qwen2": (Qwen2Config, gated.qwen2),
    "qwen3": (Qwen3Config, gated.qwen3),
    "gemma2": (Gemma2Config, gated.gemma2),
    "gemma3_text": (Gemma3Config, gated.gemma3),
    "olmo2": (Olmo2Config, gated.olmo2),
    "phi3": (Phi3Config, gated.phi3),
}


def read_config(path: str | os.PathLike) -> LanguageModelConfig:
    """Reads the config of a published folder, or of the folder that contains a weight file.

    Raises:
        LanguageModelError: no readable ``config.json``, or an unsupported model.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise LanguageModelError(f"{file}: no such file; a language model's sizes stand in it, fetch it too")
    try:
        values = read_json(file)
    except ForeignError as error:
        raise LanguageModelError(f"{file}: {error}; fetch it again") from None
    try:
        return from_hf_config(values)
    except LanguageModelError as error:
        raise LanguageModelError(f"{file}: {error}") from None


def from_hf_config(values: Any) -> LanguageModelConfig:
    """Converts the values of a ``config.json``.

    Raises:
        LanguageModelError: an unsupported model or setting, or a field that is not known.
    """
    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if kind == gated.GEMMA3_WITH_IMAGES:
        kind, values = "gemma3_text", gated.text_part(Fields(values))
    if kind not in list(CONFIGS):
        raise LanguageModelError(f"model_type {shown(kind)} is none of the language models here: {', '.join(CONFIGS)}")
    config, convert = CONFIGS[kind]
    fields = Fields(values)
    # Another family of models altogether.
    fields.require(is_encoder_decoder=(False, False))
    try:
        converted = from_dict(config, convert(fields), kind)
        converted.trunk()  # refuses what no block can have
    except LanguageModelError:
        raise
    except KeyError as error:
        raise LanguageModelError(f"a {kind} config lacks {error.args[0]!r}") from None
    # ConfigError, and errors from values of the wrong type or size.
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise LanguageModelError(f"not the config of a published model ({error})") from None
    fields.check_all_read()
    return converted
