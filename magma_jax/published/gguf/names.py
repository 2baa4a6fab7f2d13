"""Names of llama.cpp's tensors, and the order of its query and key rows."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from magma_jax.models.language.gated import GatedConfig
from magma_jax.storage.deferred import Deferred

# llama.cpp's name -> Hugging Face's, which the key tables have.
_TABLES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hugging_face_tensors(tensors: Mapping[str, Deferred], config: GatedConfig) -> dict[str, Deferred]:
    """Tensors under Hugging Face's names and in its order of rows; unknown names stay as they are.

    llama.cpp rotates neighbouring features in ``llama``, so its converter interleaves the two halves of each head's
    query and key rows, which is undone here. Other architectures keep Hugging Face's order.
    """
    found = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            stem, _, part = name.rpartition(".")
            found[f"{_TABLES.get(stem, stem)}.{part}"] = tensor
            continue
        number, place, part = match.groups()
        if config.kind == "llama" and place in ("attn_q", "attn_k"):
            tensor = _halves(tensor, config.heads if place == "attn_q" else config.kv_heads)
        found[f"model.layers.{number}.{_LAYER.get(place, place)}.{part}"] = tensor
    return found


def _halves(tensor: Deferred, heads: int) -> Deferred:
    if tensor.shape[0] % (2 * heads):
        return tensor  # a shape that the key map refuses

    def read() -> np.ndarray:
        rows = tensor.read()
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return dataclasses.replace(tensor, read=read)
