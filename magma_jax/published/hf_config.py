"""Converts a language model's Hugging Face ``config.json`` to our config.

Unsupported settings that change the model's function are refused by name; training settings are ignored.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from magma_jax.config import from_dict
from magma_jax.foreign import ForeignError, read_json, shown
from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.decoder import MAX_LAYERS
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig

# Hugging Face's activation name -> ours.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class LanguageModelError(ValueError):
    """Unsupported language model; one line with the file and the unsupported setting."""


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
        LanguageModelError: an unsupported model or setting.
    """
    kind = values.get("model_type") if isinstance(values, Mapping) else None
    if kind not in list(CONFIGS):
        raise LanguageModelError(f"model_type {shown(kind)} is none of the language models here: {', '.join(CONFIGS)}")
    try:
        config, fields = CONFIGS[kind]
        return from_dict(config, fields(values), kind)
    except LanguageModelError:
        raise
    except KeyError as error:
        raise LanguageModelError(f"a {kind} config lacks {error.args[0]!r}") from None
    # ConfigError, and errors from values of the wrong type or size.
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise LanguageModelError(f"not the config of a published model ({error})") from None


def _gptj(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, tie_word_embeddings=(False, False), activation_function=("gelu_new", "gelu_new"))
    return {
        "layers": hf["n_layer"],
        "width": hf["n_embd"],
        "heads": hf["n_head"],
        "rotary_dim": hf["rotary_dim"] or hf["n_embd"] // hf["n_head"],
        "feed_forward": hf.get("n_inner") or 4 * hf["n_embd"],
        "vocab_rows": hf["vocab_size"],
        "head_rows": hf["vocab_size"],
        "context_length": hf["n_positions"],
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def _gpt2(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(
        hf,
        tie_word_embeddings=(True, True),
        scale_attn_weights=(True, True),
        scale_attn_by_inverse_layer_idx=(False, False),
        add_cross_attention=(False, False),
    )
    return {
        "layers": hf["n_layer"],
        "width": hf["n_embd"],
        "heads": hf["n_head"],
        "feed_forward": hf.get("n_inner") or 4 * hf["n_embd"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["n_positions"],
        "activation": _activation(hf["activation_function"]),
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def _gpt_neo(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, tie_word_embeddings=(True, True))
    # Bounded: a file may ask for 10**12 of them.
    repeated = (kind for pattern, times in hf["attention_types"] for _ in range(times) for kind in pattern)
    kinds = tuple(itertools.islice(repeated, MAX_LAYERS))
    if len(kinds) != hf["num_layers"] or set(kinds) - {"global", "local"}:
        types = shown(hf["attention_types"])
        raise LanguageModelError(f"attention_types {types} do not fit {shown(hf['num_layers'])} layers")
    # Shortest pattern whose repetition gives the same layers.
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    return {
        "layers": hf["num_layers"],
        "width": hf["hidden_size"],
        "heads": hf["num_heads"],
        "feed_forward": hf.get("intermediate_size") or 4 * hf["hidden_size"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "attention": kinds[:period],
        "window": hf["window_size"],
        "activation": _activation(hf["activation_function"]),
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def _gpt_neox(hf: Mapping[str, Any]) -> dict[str, Any]:
    _require(hf, tie_word_embeddings=(False, False), rope_scaling=(None, None))
    # transformers 5 moved the rotary settings to one dict.
    rope = hf.get("rope_parameters") or {}
    _require(rope, rope_type=("default", "default"))
    head_size = hf["hidden_size"] // hf["num_attention_heads"]
    fraction = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    return {
        "layers": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "heads": hf["num_attention_heads"],
        "rotary_dim": int(head_size * fraction),
        "feed_forward": hf["intermediate_size"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "rotary_base": rope.get("rope_theta", hf.get("rotary_emb_base", 10_000)),
        "parallel_residual": hf.get("use_parallel_residual", True),
        "attention_bias": hf.get("attention_bias", True),
        "activation": _activation(hf["hidden_act"]),
        "layernorm_eps": hf["layer_norm_eps"],
    }


# By ``model_type``, which equals our config's ``kind``: config class, and conversion of ``config.json`` to its fields.
CONFIGS: dict[str, tuple[type[LanguageModelConfig], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "gptj": (GPTJConfig, _gptj),
    "gpt2": (GPT2Config, _gpt2),
    "gpt_neo": (GPTNeoConfig, _gpt_neo),
    "gpt_neox": (GPTNeoXConfig, _gpt_neox),
}


def _activation(name: str) -> str:
    if name not in ACTIVATION_NAMES:
        raise LanguageModelError(f"activation {shown(name)} is none of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def _require(hf: Mapping[str, Any], **settings: tuple[Any, Any]) -> None:
    """Raises LanguageModelError unless every setting, given as (required value, default), has its required value."""
    for name, (wanted, default) in settings.items():
        if (found := hf.get(name, default)) != wanted:
            raise LanguageModelError(f"{name} {shown(found)} is not offered here, only {wanted!r}")
