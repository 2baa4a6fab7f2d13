"""Key table of the released MAGVLT checkpoints' transformer (``model.*`` of ``magvlt-it2it-*.ckpt``).

The image tokenizer below ``model_vqvae.`` has a table of its own. The linear layers of a block's MLP are ``mlp.0`` and
``mlp.2``; those of attention come in the order key, query, value.
"""

from collections.abc import Iterable
from typing import TypeVar

from magma_jax.published.keymap.engine import Rule

T = TypeVar("T")

ROOT = "model."
# Prefix of the image tokenizer's keys.
TOKENIZER = "model_vqvae."

_BLOCK = ROOT + "blocks.{layer}."
_LAYERS = {
    "ln1": "ln_1",
    "ln2": "ln_2",
    "attn.key": "attn/k_proj",
    "attn.query": "attn/q_proj",
    "attn.value": "attn/v_proj",
    "attn.proj": "attn/out_proj",
    "mlp.0": "mlp/c_fc",
    "mlp.2": "mlp/c_proj",
}


def transformer_table() -> list[Rule]:
    """The table, both directions; it is the same for all sizes."""
    return [
        Rule(f"{ROOT}tok_emb.weight", "wte/weight"),
        Rule(f"{ROOT}tok_emb_spc.weight", "special/weight"),
        *(
            Rule(f"{_BLOCK}{theirs}.{part}", f"layers/{ours}/{part}", stack="layer")
            for theirs, ours in _LAYERS.items()
            for part in ("weight", "bias")
        ),
        Rule(f"{ROOT}lm_layer.output_bias", "head_bias"),
        *(
            Rule(f"{ROOT}lm_layer.{theirs}.{part}", f"{ours}/{part}")
            for theirs, ours in (("linear", "head_proj"), ("ln", "head_norm"))
            for part in ("weight", "bias")
        ),
        Rule(f"{ROOT}pos_emb_img.pos_embed", "image_positions/weight"),
        Rule(f"{ROOT}pos_emb_txt.pos_embed", "text_positions/weight"),
        Rule(f"{ROOT}pos_emb_spc.pos_embed", "special_positions/weight"),
        Rule(f"{ROOT}length_predictor.weight", "length_head/weight"),
    ]


def without_tokenizer(tensors: Iterable[tuple[str, T]]) -> dict[str, T]:
    """A checkpoint's tensors but the image tokenizer's."""
    return {key: tensor for key, tensor in tensors if not key.startswith(TOKENIZER)}
