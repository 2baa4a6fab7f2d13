"""Key tables of Hugging Face's language models, one per kind, for exact conversion in both directions.

All weights are (out, in) on both sides, except in GPT-2's files, which hold (in, out).
"""

from collections.abc import Callable, Iterable

import numpy as np

from magma_jax.models.language.catalog import LanguageModelConfig
from magma_jax.published.keymap.engine import Alias, Ignored, Rule

Entry = Rule | Alias | Ignored


def language_model_table(config: LanguageModelConfig, keys: Iterable[str] | None = None) -> list[Entry]:
    """Key table of a language model. ``keys`` are a file's keys, which may lack the usual root prefix."""
    table, root = TABLES[config.kind]
    has_root = keys is None or any(key.startswith(root) for key in keys)
    return table(root if has_root else "")


def _gptj_table(root: str) -> list[Entry]:
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


def _gpt2_table(root: str) -> list[Entry]:
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


def _gpt_neo_table(root: str) -> list[Entry]:
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


def _gpt_neox_table(root: str) -> list[Entry]:
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


# Table of each kind, and the root prefix of all keys except the head's; GPT-2 files may lack it.
TABLES: dict[str, tuple[Callable[[str], list[Entry]], str]] = {
    "gptj": (_gptj_table, "transformer."),
    "gpt2": (_gpt2_table, "transformer."),
    "gpt_neo": (_gpt_neo_table, "transformer."),
    "gpt_neox": (_gpt_neox_table, "gpt_neox."),
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
