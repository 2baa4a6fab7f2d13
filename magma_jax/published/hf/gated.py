"""Llama, Mistral, SmolLM3, Qwen2, Qwen3, Gemma 2 and 3, OLMo 2 and Phi-3."""

from collections.abc import Mapping
from typing import Any

from magma_jax.foreign import shown
from magma_jax.models.language.decoder import MAX_LAYERS
from magma_jax.published.hf.fields import Fields, LanguageModelError, activation, of_layers, shortest_period

# ``model_type`` of a Gemma 3 with an image encoder, and what its text part's fields are where they are left out.
GEMMA3_WITH_IMAGES = "gemma3"
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def llama(hf: Fields) -> dict[str, Any]:
    """Fields of ``LlamaConfig``."""
    hf.require(attention_bias=(False, False), mlp_bias=(False, False), rope_interleaved=(False, False))
    return _sizes(hf) | _rotary(hf)


def mistral(hf: Fields) -> dict[str, Any]:
    """Fields of ``MistralConfig``."""
    return _sizes(hf) | _rotary(hf) | {"window": hf.get("sliding_window", 4096)}


def smollm3(hf: Fields) -> dict[str, Any]:
    """Fields of ``SmolLM3Config``."""
    hf.require(attention_bias=(False, False), mlp_bias=(False, False))
    _require_full_attention(hf)
    layers, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    turned = hf.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % interval != 0) for i in _layers(layers)]
    turned = of_layers("no_rope_layers", turned, (0, 1), layers)
    pattern = tuple(bool(turn) for turn in shortest_period(turned))
    return _sizes(hf, tied=True) | _rotary(hf, theta=2_000_000.0) | {"rotary_layers": pattern}


def qwen2(hf: Fields) -> dict[str, Any]:
    """Fields of ``Qwen2Config``."""
    hf.require(use_mrope=(False, False))
    _require_full_attention(hf)
    return _sizes(hf) | _rotary(hf)


def qwen3(hf: Fields) -> dict[str, Any]:
    """Fields of ``Qwen3Config``."""
    hf.require(attention_bias=(False, False))
    _require_full_attention(hf)
    return _sizes(hf, head_size=128) | _rotary(hf)


def olmo2(hf: Fields) -> dict[str, Any]:
    """Fields of ``Olmo2Config``."""
    hf.require(attention_bias=(False, False))
    return _sizes(hf, eps=1e-5) | _rotary(hf)


def phi3(hf: Fields) -> dict[str, Any]:
    """Fields of ``Phi3Config``."""
    hf.require(attention_bias=(False, False), mlp_bias=(False, False), lm_head_bias=(False, False))
    hf.skip("original_max_position_embeddings")  # of longrope, which is refused
    return _sizes(hf, eps=1e-5) | _rotary(hf) | {"window": hf.get("sliding_window")}


def gemma2(hf: Fields) -> dict[str, Any]:
    """Fields of ``Gemma2Config``."""
    caps = {"score_cap": hf.get("attn_logit_softcapping", 50.0), "logit_cap": hf.get("final_logit_softcapping", 30.0)}
    return _gemma(hf, pattern=2) | _rotary(hf) | caps


def gemma3(hf: Fields) -> dict[str, Any]:
    """Fields of ``Gemma3Config``."""
    hf.require(attn_logit_softcapping=(None, None), final_logit_softcapping=(None, None))
    fields = _gemma(hf, pattern=hf.get("_sliding_window_pattern", hf.get("sliding_window_pattern", 6)))
    hf.skip("sliding_window_pattern")
    both = hf.get("rope_parameters")
    if both is None:
        local = hf.get("rope_local_base_freq", 10_000.0)
        return fields | _rotary(hf, theta=1_000_000.0) | {"local_rotary_base": local}
    if not isinstance(both, Mapping) or set(both) != {FULL, SLIDING}:
        raise LanguageModelError(f"rope_parameters {shown(both)} are not those of {FULL} and {SLIDING}")
    far, near = (rope_settings(both[kind], hf, theta) for kind, theta in ((FULL, 1_000_000.0), (SLIDING, 10_000.0)))
    if near["rotary_scaling"] is not None:
        raise LanguageModelError(f"rope_parameters of {SLIDING} are scaled, which is not offered here")
    return fields | far | {"local_rotary_base": near["rotary_base"]}


def text_part(hf: Fields) -> dict[str, Any]:
    """The text part of a Gemma 3 that has an image encoder, which is left out; its fields with their defaults.

    Raises:
        LanguageModelError: no text part, or a field that is not known.
    """
    hf.skip("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    hf.require(tie_word_embeddings=(True, True))
    text = hf.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") != "gemma3_text":
        raise LanguageModelError(f"text_config {shown(text)} is not that of a gemma3_text")
    hf.check_all_read()
    return {**_GEMMA3_DEFAULTS, **text}


def _gemma(hf: Fields, pattern: Any) -> dict[str, Any]:
    hf.require(attention_bias=(False, False))
    if hf.get("use_bidirectional_attention"):
        raise LanguageModelError("use_bidirectional_attention True is not offered here, only False")
    found = activation(hf.get("hidden_activation") or "gelu_pytorch_tanh")
    if found != "gelu_tanh":
        raise LanguageModelError(f"hidden_activation {shown(hf['hidden_activation'])} is not offered here")
    hf.skip("hidden_act")  # of older files; hidden_activation is what counts
    layers = hf["num_hidden_layers"]
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if (i + 1) % pattern else FULL for i in _layers(layers)]
    kinds = of_layers("layer_types", kinds, (SLIDING, FULL), layers)
    return {
        **_sizes(hf, tied=True, head_size=256, act=None),
        "attention": tuple("local" if kind == SLIDING else "global" for kind in shortest_period(kinds)),
        "window": hf.get("sliding_window", 4096),
        "score_scale": hf.get("query_pre_attn_scalar", 256),
    }


def _layers(count: int) -> range:
    # Bounded: a file may ask for 10**12 of them.
    return range(min(count, MAX_LAYERS + 1))


def _sizes(
    hf: Fields, *, tied: bool = False, head_size: int | None = None, eps: float = 1e-6, act: str | None = "silu"
) -> dict[str, Any]:
    """Fields that all have; the arguments are defaults of the kind."""
    if act is not None:
        hf.require(hidden_act=(act, act))
    heads, width = hf.size("num_attention_heads"), hf.size("hidden_size")
    return {
        "layers": hf["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_size": hf.get("head_dim") or head_size or width // heads,
        "feed_forward": hf["intermediate_size"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "tied": hf.get("tie_word_embeddings", tied),
        "layernorm_eps": hf.get("rms_norm_eps", eps),
    }


def _rotary(hf: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Base and scaling; transformers 5 moved them to one dict."""
    hf.require(partial_rotary_factor=(1.0, 1.0))
    theta, scaling = hf.get("rope_theta", theta), hf.get("rope_scaling")
    return rope_settings(hf.get("rope_parameters") or scaling or {}, hf, theta)


def rope_settings(values: Any, hf: Fields, theta: Any) -> dict[str, Any]:
    """Fields ``rotary_base`` and ``rotary_scaling`` from a ``rope_parameters`` or ``rope_scaling``.

    Raises:
        LanguageModelError: another kind of scaling than Llama 3's and the linear one, or a setting that is not known.
    """
    if not isinstance(values, Mapping):
        raise LanguageModelError(f"rope settings {shown(values)} are no mapping")
    rope = Fields(values)
    rope.require(partial_rotary_factor=(1.0, 1.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.skip("type")
    base, scaling = rope.get("rope_theta", theta), None
    if kind == "linear":
        scaling = {"factor": rope["factor"], "method": "linear"}
    elif kind == "llama3":
        scaling = {
            "factor": rope["factor"],
            "low": rope["low_freq_factor"],
            "high": rope["high_freq_factor"],
            "context": rope.get("original_max_position_embeddings") or hf["max_position_embeddings"],
        }
    elif kind != "default":
        raise LanguageModelError(f"rope_type {shown(kind)} is not offered here, only default, linear and llama3")
    rope.check_all_read()
    return {"rotary_base": base, "rotary_scaling": scaling}


def _require_full_attention(hf: Fields) -> None:
    hf.require(use_sliding_window=(False, False))
    hf.skip("sliding_window", "max_window_layers")  # without effect then
    if (kinds := hf.get("layer_types")) is not None:
        of_layers("layer_types", kinds, (FULL,), hf["num_hidden_layers"])
