"""GPT-J, GPT-2, GPT-Neo, GPT-NeoX and OPT."""

import itertools
from typing import Any

from magma_jax.foreign import shown
from magma_jax.models.language.decoder import MAX_LAYERS
from magma_jax.published.hf.fields import Fields, LanguageModelError, activation, shortest_period


def gptj(hf: Fields) -> dict[str, Any]:
    """Fields of ``GPTJConfig``."""
    hf.require(
        tie_word_embeddings=(False, False),
        activation_function=("gelu_new", "gelu_new"),
        rotary=(True, True),
        scale_attn_weights=(True, True),
    )
    return {
        "layers": hf["n_layer"],
        "width": hf.size("n_embd"),
        "heads": hf.size("n_head"),
        "rotary_dim": hf["rotary_dim"] or hf["n_embd"] // hf["n_head"],
        "feed_forward": hf.get("n_inner") or 4 * hf["n_embd"],
        "vocab_rows": hf["vocab_size"],
        "head_rows": hf["vocab_size"],
        "context_length": hf["n_positions"],
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def gpt2(hf: Fields) -> dict[str, Any]:
    """Fields of ``GPT2Config``."""
    hf.require(
        tie_word_embeddings=(True, True),
        scale_attn_weights=(True, True),
        scale_attn_by_inverse_layer_idx=(False, False),
        add_cross_attention=(False, False),
    )
    hf.skip("n_ctx", "reorder_and_upcast_attn")  # the number of positions again; the dtype of scores, here fp32
    return {
        "layers": hf["n_layer"],
        "width": hf.size("n_embd"),
        "heads": hf["n_head"],
        "feed_forward": hf.get("n_inner") or 4 * hf["n_embd"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["n_positions"],
        "activation": activation(hf["activation_function"]),
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def gpt_neo(hf: Fields) -> dict[str, Any]:
    """Fields of ``GPTNeoConfig``."""
    hf.require(tie_word_embeddings=(True, True))
    hf.skip("attention_layers")  # attention_types, written out
    # Bounded: a file may ask for 10**12 of them.
    repeated = (kind for pattern, times in hf["attention_types"] for _ in range(times) for kind in pattern)
    kinds = tuple(itertools.islice(repeated, MAX_LAYERS))
    if len(kinds) != hf["num_layers"] or set(kinds) - {"global", "local"}:
        types = shown(hf["attention_types"])
        raise LanguageModelError(f"attention_types {types} do not fit {shown(hf['num_layers'])} layers")
    return {
        "layers": hf["num_layers"],
        "width": hf.size("hidden_size"),
        "heads": hf["num_heads"],
        "feed_forward": hf.get("intermediate_size") or 4 * hf["hidden_size"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "attention": shortest_period(kinds),
        "window": hf["window_size"],
        "activation": activation(hf["activation_function"]),
        "layernorm_eps": hf["layer_norm_epsilon"],
    }


def gpt_neox(hf: Fields) -> dict[str, Any]:
    """Fields of ``GPTNeoXConfig``."""
    hf.require(tie_word_embeddings=(False, False), rope_scaling=(None, None))
    # transformers 5 moved the rotary settings to one dict.
    rope = Fields(hf.get("rope_parameters") or {})
    rope.require(rope_type=("default", "default"))
    head_size = hf.size("hidden_size") // hf.size("num_attention_heads")
    fraction, base = hf.get("rotary_pct", 0.25), hf.get("rotary_emb_base", 10_000)
    fields = {
        "layers": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "heads": hf["num_attention_heads"],
        "rotary_dim": int(head_size * rope.get("partial_rotary_factor", fraction)),
        "feed_forward": hf["intermediate_size"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "rotary_base": rope.get("rope_theta", base),
        "parallel_residual": hf.get("use_parallel_residual", True),
        "attention_bias": hf.get("attention_bias", True),
        "activation": activation(hf["hidden_act"]),
        "layernorm_eps": hf["layer_norm_eps"],
    }
    rope.check_all_read()
    return fields


def opt(hf: Fields) -> dict[str, Any]:
    """Fields of ``OPTConfig``."""
    hf.require(
        tie_word_embeddings=(True, True),
        do_layer_norm_before=(True, True),
        _remove_final_layer_norm=(False, False),
        enable_bias=(True, True),
        layer_norm_elementwise_affine=(True, True),
        word_embed_proj_dim=(hf["hidden_size"], hf["hidden_size"]),
    )
    return {
        "layers": hf["num_hidden_layers"],
        "width": hf["hidden_size"],
        "heads": hf["num_attention_heads"],
        "feed_forward": hf["ffn_dim"],
        "vocab_rows": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "activation": activation(hf["activation_function"]),
    }
