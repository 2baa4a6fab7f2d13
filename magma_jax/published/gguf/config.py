"""Sizes of a language model from the metadata of a GGUF file."""

import re
from collections.abc import Mapping
from typing import Any

from magma_jax.foreign import shown
from magma_jax.models.language.gated import GatedConfig
from magma_jax.published.hf.fields import LanguageModelError
from magma_jax.published.hf_config import from_hf_config
from magma_jax.storage.deferred import Deferred

# ``general.architecture``, which equals our config's ``kind``.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Metadata below the architecture's name -> field of ``config.json``.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
}
# Read below, or repeated by the tensors.
_OTHERS = {"attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size"}
# Metadata that no logit depends on.
_ELSEWHERE = re.compile(r"(general|tokenizer|quantize)\..*|split\.(no|count|tensors\.count)")


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, Deferred]) -> GatedConfig:
    """Config of a file's language model.

    Raises:
        LanguageModelError: another architecture, metadata that is missing, or that is not known and may change the
            model.
    """
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise LanguageModelError(f"the architecture {shown(kind)} is none of {', '.join(ARCHITECTURES)}")
    if int(metadata.get("split.count", 1)) > 1:
        raise LanguageModelError("is one of several parts; join them with llama.cpp's gguf-split")
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    unknown = sorted(f"{kind}.{name}" for name in own.keys() - _FIELDS.keys() - _OTHERS)
    unknown += sorted(key for key in metadata if not key.startswith(f"{kind}.") and not _ELSEWHERE.fullmatch(key))
    if unknown:
        raise LanguageModelError(f"metadata that is not known here: {shown(unknown[:5])}; it may change the model")
    if "rope_freqs.weight" in tensors:
        raise LanguageModelError(
            "Llama 3's scaled rotary frequencies are a tensor in this file, which is not offered; take the safetensors"
        )
    table = tensors.get("token_embd.weight")
    if table is None:
        raise LanguageModelError("has no token_embd.weight; it holds no language model")
    # A file keeps fp32, where config.json has a decimal number.
    values = {ours: _decimal(own[theirs]) for theirs, ours in _FIELDS.items() if theirs in own}
    values |= {"model_type": kind, "vocab_size": table.shape[0], "tie_word_embeddings": "output.weight" not in tensors}
    if own.get("rope.scaling.type", "none") != "none":
        values["rope_scaling"] = {"rope_type": own["rope.scaling.type"], "factor": own.get("rope.scaling.factor")}
    config = from_hf_config(values)
    assert isinstance(config, GatedConfig)  # all architectures read here are
    for name in ("rope.dimension_count", "attention.value_length"):
        if own.get(name, config.head_size) != config.head_size:
            raise LanguageModelError(f"{kind}.{name} {own[name]} is not offered, only heads of {config.head_size}")
    return config


def _decimal(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value
