"""Key tables of Hugging Face's language models, one per kind, for exact conversion in both directions.

All weights are (out, in) on both sides, except in GPT-2's files, which hold (in, out).
"""

from collections.abc import Callable, Iterable

import numpy as np

from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.published.keymap.engine import Alias, Ignored, Rule

Entry = Rule | Alias | Ignored


def language_model_table(config: LanguageModelConfig, keys: Iterable[str] | None = None) -> list[Entry]:
    """Key table of a language model. ``keys`` are a file's keys, which may have another root prefix than usual."""
    table, roots = TABLES[config.kind]
    names = None if keys is None else list(keys)
    if names is None:
        return table(config, roots[0])
    found = (root for root in sorted(roots, key=len, reverse=True) if any(name.startswith(root) for name in names))
    return table(config, next(found, ""))


def _gptj_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    layer = root + "h.{layer}."
    return [
        Rule(f"{root}wte.weight", "wte/weight"),
        *_pair(f"{layer}ln_1", "layers/ln_1"),
        *(
            Rule(f"{layer}attn.{name}.weight", f"layers/attn/{name}/weight", stack="layer")
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        ),
        *_pair(f"{layer}mlp.fc_in", "layers/mlp/c_fc"),
        *_pair(f"{layer}mlp.fc_out", "layers/mlp/c_proj"),
        *_pair(f"{root}ln_f", "ln_f"),
        *_pair("lm_head", "lm_head"),
        *_masks(f"{layer}attn."),
    ]


def _gpt2_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    layer = root + "h.{layer}."
    names = {
        "attn.c_attn": "attn/qkv_proj",
        "attn.c_proj": "attn/out_proj",
        "mlp.c_fc": "mlp/c_fc",
        "mlp.c_proj": "mlp/c_proj",
    }
    transposed = {"stack": "layer", "to_ours": np.transpose, "to_theirs": np.transpose}
    return [
        *_tables_and_norms(root),
        *(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/weight", **transposed) for theirs, ours in names.items()),
        *(Rule(f"{layer}{theirs}.bias", f"layers/{ours}/bias", stack="layer") for theirs, ours in names.items()),
        *_masks(f"{layer}attn."),
    ]


def _gpt_neo_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    layer = root + "h.{layer}."
    attention = f"{layer}attn.attention."
    return [
        *_tables_and_norms(root),
        *(
            Rule(f"{attention}{name}.weight", f"layers/attn/{name}/weight", stack="layer")
            for name in ("q_proj", "k_proj", "v_proj")
        ),
        *_pair(f"{attention}out_proj", "layers/attn/out_proj"),
        *_pair(f"{layer}mlp.c_fc", "layers/mlp/c_fc"),
        *_pair(f"{layer}mlp.c_proj", "layers/mlp/c_proj"),
        *_masks(attention),
    ]


def _gpt_neox_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    layer = root + "layers.{layer}."
    names = {
        "input_layernorm": "ln_1",
        "attention.query_key_value": "attn/qkv_proj",
        "attention.dense": "attn/out_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp/c_fc",
        "mlp.dense_4h_to_h": "mlp/c_proj",
    }
    return [
        Rule(f"{root}embed_in.weight", "wte/weight"),
        *(rule for theirs, ours in names.items() for rule in _pair(layer + theirs, f"layers/{ours}")),
        *_pair(f"{root}final_layer_norm", "ln_f"),
        Rule("embed_out.weight", "lm_head/weight"),
        *_masks(f"{layer}attention."),
        Ignored(f"{layer}attention.rotary_emb.inv_freq"),
    ]


def _opt_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    layer = root + "layers.{layer}."
    names = {
        "self_attn_layer_norm": "ln_1",
        **{f"self_attn.{name}": f"attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "final_layer_norm": "ln_2",
        "fc1": "mlp/c_fc",
        "fc2": "mlp/c_proj",
    }
    return [
        Rule(f"{root}embed_tokens.weight", "wte/weight"),
        Alias("lm_head.weight", f"{root}embed_tokens.weight"),
        Rule(f"{root}embed_positions.weight", "wpe/weight"),
        *(rule for theirs, ours in names.items() for rule in _pair(layer + theirs, f"layers/{ours}")),
        *_pair(f"{root}final_layer_norm", "ln_f"),
        Ignored(f"{root}version"),
    ]


# Norms by ``BlockConfig.residual``.
_NORMS = {
    "sequential": {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"},
    "post": {"post_attention_layernorm": "ln_1_out", "post_feedforward_layernorm": "ln_2_out"},
    "sandwich": {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_1_out",
        "pre_feedforward_layernorm": "ln_2",
        "post_feedforward_layernorm": "ln_2_out",
    },
}


def _gated_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    """Llama's names, and those of its relatives, as the block's config has them."""
    block, layer = config.trunk().block, root + "layers.{layer}."
    projections = ("q", "k", "v") if block.projections == "separate" else ("qkv",)
    names = {
        **_NORMS[block.residual],
        **{f"self_attn.{name}_proj": f"attn/{name}_proj" for name in projections},
        "self_attn.o_proj": "attn/out_proj",
        **({f"self_attn.{name}_norm": f"attn/ln_{name}" for name in ("q", "k")} if block.qk_norm else {}),
        **({"mlp.gate_up_proj": "mlp/c_fc"} if block.gate == "joint" else {}),
        **({"mlp.gate_proj": "mlp/c_gate", "mlp.up_proj": "mlp/c_fc"} if block.gate == "separate" else {}),
        "mlp.down_proj": "mlp/c_proj",
    }
    biases = [f"{name}_proj" for name in projections] if "qkv" in block.biases else []
    return [
        Rule(f"{root}embed_tokens.weight", "wte/weight"),
        *(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/weight", stack="layer") for theirs, ours in names.items()),
        *(Rule(f"{layer}self_attn.{name}.bias", f"layers/attn/{name}/bias", stack="layer") for name in biases),
        Rule(f"{root}norm.weight", "ln_f/weight"),
        _head(config, f"{root}embed_tokens.weight"),
        Ignored(f"{layer}self_attn.rotary_emb.inv_freq"),
    ]


def _gemma3_table(config: LanguageModelConfig, root: str) -> list[Entry]:
    """The text part's names, and those of the image encoder that Gemma 3 has from 4B on, which is left out."""
    parts = [f"{at}{part}" for at in ("", "model.") for part in ("vision_tower", "multi_modal_projector")]
    return [*_gated_table(config, root), *(Ignored(part + ".{rest...}") for part in parts)]


def _head(config: LanguageModelConfig, embedding: str) -> Entry:
    return Alias("lm_head.weight", embedding) if config.head == "tied" else Rule("lm_head.weight", "lm_head/weight")


_GATED = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "olmo2", "phi3")
# Table of each kind, and root prefixes of all keys except the head's: the usual one first. Files of bare models have
# none of them.
TABLES: dict[str, tuple[Callable[[LanguageModelConfig, str], list[Entry]], tuple[str, ...]]] = {
    "gptj": (_gptj_table, ("transformer.",)),
    "gpt2": (_gpt2_table, ("transformer.",)),
    "gpt_neo": (_gpt_neo_table, ("transformer.",)),
    "gpt_neox": (_gpt_neox_table, ("gpt_neox.",)),
    "opt": (_opt_table, ("model.decoder.", "decoder.")),
    **dict.fromkeys(_GATED, (_gated_table, ("model.",))),
    "gemma3_text": (_gemma3_table, ("model.", "model.language_model.", "language_model.model.")),
}


def _tables_and_norms(root: str) -> list[Entry]:
    """Shared entries of GPT-2 and GPT-Neo; their head is tied to the embedding table."""
    return [
        Rule(f"{root}wte.weight", "wte/weight"),
        Alias("lm_head.weight", f"{root}wte.weight"),
        Rule(f"{root}wpe.weight", "wpe/weight"),
        *_pair(root + "h.{layer}.ln_1", "layers/ln_1"),
        *_pair(root + "h.{layer}.ln_2", "layers/ln_2"),
        *_pair(f"{root}ln_f", "ln_f"),
    ]


def _pair(theirs: str, ours: str) -> list[Rule]:
    stack = "layer" if "{layer}" in theirs else None
    return [Rule(f"{theirs}.{part}", f"{ours}/{part}", stack=stack) for part in ("weight", "bias")]


def _masks(attention: str) -> list[Ignored]:
    """Causal masks, stored in every layer of older files."""
    return [Ignored(f"{attention}bias"), Ignored(f"{attention}masked_bias")]
