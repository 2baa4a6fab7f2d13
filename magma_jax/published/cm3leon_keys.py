"""Key tables of CM3Leon's layouts: Hugging Face's OPT, and metaseq's with separate query, key and value matrices.

There are no published weights. Norms have no keys, since they have no parameters.
"""

from collections.abc import Collection, Iterable
from typing import Literal

from magma_jax.published.keymap.engine import Alias, Rule

# Prefix of all keys but the head's.
ROOTS = {"opt": "model.decoder.", "metaseq": "decoder."}
Layout = Literal["opt", "metaseq"]


def cm3leon_table(layout: Layout = "opt") -> list[Rule | Alias]:
    """Key table of a layout, for both directions. metaseq's files have no second name of the tied head."""
    root = ROOTS[layout]
    layer = root + "layers.{layer}."
    names = {
        **{f"self_attn.{name}": f"attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "fc1": "mlp/c_fc",
        "fc2": "mlp/c_proj",
    }
    return [
        Rule(f"{root}embed_tokens.weight", "wte/weight"),
        Rule(f"{root}embed_positions.weight", "wpe/weight"),
        *(Rule(f"{layer}{theirs}.weight", f"layers/{ours}/weight", stack="layer") for theirs, ours in names.items()),
        *([Alias("lm_head.weight", f"{root}embed_tokens.weight")] if layout == "opt" else []),
    ]


def is_cm3leon(keys: Collection[str]) -> bool:
    """Whether tensors of these names are an OPT-style or metaseq-style decoder without biases."""
    found = any({f"{root}embed_tokens.weight", f"{root}embed_positions.weight"} <= set(keys) for root in ROOTS.values())
    return found and not any(key.endswith(".bias") for key in keys)


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout whose keys these are.

    Raises:
        ValueError: of neither.
    """
    found = set(keys)
    for layout, root in ROOTS.items():
        if f"{root}embed_tokens.weight" in found:
            return "opt" if layout == "opt" else "metaseq"
    roots = " nor ".join(f"{root}embed_tokens.weight" for root in ROOTS.values())
    raise ValueError(f"the file has no {roots}; it is neither an OPT-style nor a metaseq-style checkpoint")
