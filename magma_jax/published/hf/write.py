"""``config.json`` of our language models: the inverse of ``published.hf_config``."""

from collections.abc import Callable
from typing import Any

from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.models.language.gated import GatedConfig
from magma_jax.models.language.gemma import Gemma2Config, Gemma3Config, GemmaConfig
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.language.llama import MistralConfig, SmolLM3Config
from magma_jax.models.language.opt import OPTConfig
from magma_jax.models.language.phi3 import Phi3Config
from magma_jax.models.language.qwen import Qwen2Config, Qwen3Config

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}

# transformers' class by kind.
ARCHITECTURES = {
    "gptj": "GPTJForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neo": "GPTNeoForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def to_hf_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Values of a ``config.json`` that ``from_hf_config`` and transformers (4 and 5) read as this model.

    It has a single vocabulary size, the rows of the head.
    """
    own = _gated(config) if isinstance(config, GatedConfig) else _OLDER[type(config)](config)
    shared = {"architectures": [ARCHITECTURES[config.kind]], "model_type": config.kind, "vocab_size": config.head_rows}
    return {**shared, **own, "initializer_range": config.embedding_std}


def _gptj(config: GPTJConfig) -> dict[str, Any]:
    return {
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "rotary_dim": config.rotary_dim,
        "n_inner": config.feed_forward,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layernorm_eps,
        "tie_word_embeddings": False,
    }


def _gpt2(config: GPT2Config) -> dict[str, Any]:
    return {
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layernorm_eps,
        "tie_word_embeddings": True,
    }


def _gpt_neo(config: GPTNeoConfig) -> dict[str, Any]:
    kinds = [config.attention[i % len(config.attention)] for i in range(config.layers)]
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "intermediate_size": config.feed_forward,
        "attention_types": [[kinds, 1]],
        "window_size": config.window,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layernorm_eps,
        "tie_word_embeddings": True,
    }


def _gpt_neox(config: GPTNeoXConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.feed_forward,
        "rotary_pct": config.rotary_dim / (config.width // config.heads),
        "rotary_emb_base": config.rotary_base,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.layernorm_eps,
        "tie_word_embeddings": False,
    }


def _opt(config: OPTConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.feed_forward,
        "activation_function": _ACTIVATIONS[config.activation],
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
    }


_OLDER: dict[type, Callable[[Any], dict[str, Any]]] = {
    GPTJConfig: _gptj,
    GPT2Config: _gpt2,
    GPTNeoConfig: _gpt_neo,
    GPTNeoXConfig: _gpt_neox,
    OPTConfig: _opt,
}


def _gated(config: GatedConfig) -> dict[str, Any]:
    values = {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.feed_forward,
        "hidden_act": "silu",
        "rms_norm_eps": config.layernorm_eps,
        "rope_theta": config.rotary_base,
        "rope_scaling": _scaling(config),
        "tie_word_embeddings": config.tied,
    }
    if isinstance(config, GemmaConfig | Qwen3Config) or config.head_size * config.heads != config.width:
        values["head_dim"] = config.head_size
    if isinstance(config, MistralConfig | Phi3Config):
        values["sliding_window"] = config.window
    if isinstance(config, Qwen2Config | Qwen3Config):
        values["use_sliding_window"] = False
    if isinstance(config, SmolLM3Config):
        turns = config.rotary_layers
        values["no_rope_layers"] = [int(turns[i % len(turns)]) for i in range(config.layers)]
    if isinstance(config, GemmaConfig):
        del values["hidden_act"]
        names = {"local": "sliding_attention", "global": "full_attention"}
        values |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": [names[reach] for reach in config.reaches()],
            "sliding_window": config.window,
            "query_pre_attn_scalar": config.score_scale,
        }
    if isinstance(config, Gemma2Config):
        values |= {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}
    if isinstance(config, Gemma3Config):
        values["rope_local_base_freq"] = config.local_rotary_base
    return values


def _scaling(config: GatedConfig) -> dict[str, Any] | None:
    scaling = config.rotary_scaling
    if scaling is None:
        return None
    if scaling.method == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.context,
    }
