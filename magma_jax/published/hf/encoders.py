"""Image encoders in Hugging Face's layout: their ``config.json``, and key tables for both directions.

SigLIP, SigLIP 2, DINOv2 and DINOv3 have tables of their own. CLIP's names are translated to OpenAI's, for which
``magma_keys.encoder_table`` exists.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from magma_jax.config import from_dict
from magma_jax.foreign import shown
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.vit import DINOv2Config, DINOv3Config, SiglipConfig, ViTConfig
from magma_jax.published.hf.fields import Fields, LanguageModelError
from magma_jax.published.keymap.engine import Ignored, Rule
from magma_jax.storage.deferred import Deferred, read_array

Entry = Rule | Ignored
# A config class and its fields.
Read = tuple[type, dict[str, Any]]
# Settings of other uses of an encoder, of training and of losses.
_WITHOUT_EFFECT = [
    "apply_layernorm",
    "reshape_hidden_states",
    "out_features",
    "out_indices",
    "stage_names",
    "layerscale_value",
    "drop_path_rate",
    "use_mask_token",
    "initializer_factor",
    "logit_scale_init_value",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "pos_embed_shift",
    "pos_embed_jitter",
    "pos_embed_rescale",
]
_GELU_TANH = "gelu_pytorch_tanh"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
# What a table ignores when a file holds more than the encoder.
_OTHER_TOWERS = re.compile(r"text_model\..*|text_projection\..*|logit_(scale|bias)|.*position_ids|mask_token")


def encoder_of(values: Mapping[str, Any]) -> Any:
    """The config (``EncoderConfig``) of the encoder in a ``config.json``, with the grid as output.

    Raises:
        LanguageModelError: another model, or a setting that is not known.
    """
    kind = str(values.get("model_type"))
    if isinstance(values.get("vision_config"), Mapping) and kind in ("clip", "siglip", "siglip2"):
        part = {**values["vision_config"], "projection_dim": values.get("projection_dim", 512)}
        kind, values = f"{kind}_vision_model", part
    if kind not in _READERS:
        raise LanguageModelError(f"model_type {shown(kind)} is none of the encoders here: {', '.join(_READERS)}")
    fields = Fields(values)
    fields.skip(*_WITHOUT_EFFECT)
    fields.require(num_channels=(3, 3))
    try:
        cls, sizes = _READERS[kind](fields)
        config = from_dict(cls, sizes, kind)
    except LanguageModelError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise LanguageModelError(f"not the config of a published encoder ({error})") from None
    fields.check_all_read()
    return config


def _sizes(fields: Fields, width: int = 768, patch: int = 16, heads: int = 12) -> dict[str, Any]:
    return {
        "layers": fields.get("num_hidden_layers", 12),
        "width": fields.get("hidden_size", width),
        "heads": fields.get("num_attention_heads", heads),
        "patch": fields.get("patch_size", patch),
        "image_size": fields.get("image_size", 224),
    }


def _siglip(fields: Fields) -> Read:
    fields.require(hidden_act=(_GELU_TANH, _GELU_TANH), vision_use_head=(True, True))
    fields.skip("projection_dim")
    inner, eps = fields.get("intermediate_size", 3072), fields.get("layer_norm_eps", 1e-6)
    return SiglipConfig, _sizes(fields) | {"feed_forward": inner, "eps": eps}


def _siglip2(fields: Fields) -> Read:
    """NaFlex: patches of any grid; here the square grid of its table of positions."""
    fields.require(hidden_act=(_GELU_TANH, _GELU_TANH), vision_use_head=(True, True))
    fields.skip("projection_dim", "image_size")
    side = round(fields.get("num_patches", 256) ** 0.5)
    sizes = _sizes(fields) | {"image_size": side * fields.get("patch_size", 16)}
    inner, eps = fields.get("intermediate_size", 3072), fields.get("layer_norm_eps", 1e-6)
    return SiglipConfig, sizes | {"feed_forward": inner, "eps": eps}


def _dinov2(fields: Fields, registers: int = 0) -> Read:
    fields.require(hidden_act=("gelu", "gelu"), qkv_bias=(True, True))
    sizes, gated = _sizes(fields, patch=14), fields.get("use_swiglu_ffn", False)
    inner = int(sizes["width"] * fields.get("mlp_ratio", 4))
    inner = (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner
    eps = fields.get("layer_norm_eps", 1e-6)
    return DINOv2Config, sizes | {"feed_forward": inner, "registers": registers, "gated": gated, "eps": eps}


def _dinov3(fields: Fields) -> Read:
    gated = fields.get("use_gated_mlp", False)
    biases: dict[str, Any] = {
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
    }
    fields.require(hidden_act=("silu" if gated else "gelu", "gelu"), **{k: (v, v) for k, v in biases.items()})
    return DINOv3Config, _sizes(fields, width=384, heads=6) | {
        "feed_forward": fields.get("intermediate_size", 1536),
        "registers": fields.get("num_register_tokens", 0),
        "gated": gated,
        "rotary_base": float(fields.get("rope_theta", 100.0)),
        "eps": fields.get("layer_norm_eps", 1e-5),
    }


def _clip(fields: Fields) -> Read:
    sizes = _sizes(fields, patch=32)
    inner = 4 * sizes["width"]
    fields.require(intermediate_size=(inner, 3072), layer_norm_eps=(1e-5, 1e-5))
    names = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    if (activation := fields.get("hidden_act", "quick_gelu")) not in names:
        raise LanguageModelError(f"hidden_act {shown(activation)} is none of {', '.join(names)}")
    embedding = fields.get("projection_dim", 512)
    return CLIPViTConfig, sizes | {"embedding_width": embedding, "activation": activation, "output": "grid"}


_READERS: dict[str, Any] = {
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip2,
    "dinov2": _dinov2,
    "dinov2_with_registers": lambda fields: _dinov2(fields, fields.get("num_register_tokens", 4)),
    "dinov3_vit": _dinov3,
    "clip_vision_model": _clip,
}


def encoder_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an encoder in a file that may hold text towers and other heads, without a common first name."""
    kept = {key: tensor for key, tensor in tensors.items() if not _OTHER_TOWERS.fullmatch(key)}
    for root in ("vision_model.", "dinov2_with_registers.", "dinov2.", "dinov3_vit.", "model."):
        if any(key.startswith(root) for key in kept):
            return {key.removeprefix(root): tensor for key, tensor in kept.items() if not key.startswith("classifier.")}
    return kept


def vit_table(config: ViTConfig, *, flat_patches: bool = False) -> list[Entry]:
    """Key table of a SigLIP or DINO; ``flat_patches`` for NaFlex, whose patch embedding is a matrix."""
    if isinstance(config, SiglipConfig):
        return _siglip_table(config, flat_patches)
    return _dino_table(config)


def _siglip_table(config: SiglipConfig, flat_patches: bool) -> list[Entry]:
    layer, patch = "encoder.layers.{layer}.", config.patch
    flat: dict[str, Any] = {
        "to_ours": lambda rows: rows.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2),
        "to_theirs": lambda rows: rows.transpose(0, 2, 3, 1).reshape(len(rows), -1),
    }
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        **{f"self_attn.{name}": f"attn/{name}" for name in _PROJECTIONS},
        "mlp.fc1": "mlp/c_fc",
        "mlp.fc2": "mlp/c_proj",
    }
    head = {
        "attention.out_proj": "out_proj",
        "layernorm": "ln",
        "mlp.fc1": "mlp/c_fc",
        "mlp.fc2": "mlp/c_proj",
    }
    pooled = [
        _one("head.probe", "head/probe", 2),
        *(Rule(f"head.attention.in_proj_{name}", f"head/in_proj/{name}") for name in ("weight", "bias")),
        *(rule for theirs, ours in head.items() for rule in _pair(f"head.{theirs}", f"head/{ours}")),
    ]
    return [
        Rule("embeddings.patch_embedding.weight", "conv1/weight", **(flat if flat_patches else {})),
        Rule("embeddings.patch_embedding.bias", "conv1/bias"),
        Rule("embeddings.position_embedding.weight", "position_table"),
        *(rule for theirs, ours in names.items() for rule in _pair(layer + theirs, f"blocks/{ours}")),
        *_pair("post_layernorm", "ln_post"),
        *(pooled if config.output == "pooled" else [Ignored("head.{name...}")]),
    ]


def _dino_table(config: ViTConfig) -> list[Entry]:
    old = isinstance(config, DINOv2Config)
    layer = "encoder.layer.{layer}." if old else "layer.{layer}."
    layout = config.layout()
    attention = (
        ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense")
        if old
        else ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
    )
    inner = {
        "none": ("fc1", "fc2") if old else ("up_proj", "down_proj"),
        "joined": ("weights_in", "weights_out"),
        "beside": ("up_proj", "down_proj"),
    }[layout.gate]
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        **{theirs: f"attn/{ours}" for theirs, ours in zip(attention, _PROJECTIONS, strict=True)},
        f"mlp.{inner[0]}": "mlp/c_fc",
        f"mlp.{inner[1]}": "mlp/c_proj",
        **({"mlp.gate_proj": "mlp/c_gate"} if layout.gate == "beside" else {}),
    }
    rules = [rule for theirs, ours in names.items() for rule in _pair(layer + theirs, f"blocks/{ours}")]
    if not layout.key_bias:
        rules = [rule for rule in rules if rule.ours != "blocks/attn/k_proj/bias"]
    table: list[Entry] = [
        *_pair("embeddings.patch_embeddings.projection" if old else "embeddings.patch_embeddings", "conv1"),
        _one("embeddings.cls_token", "class_token", 2),
        *rules,
        *(Rule(f"{layer}layer_scale{i}.lambda1", f"blocks/scale_{i}", stack="layer") for i in (1, 2)),
        *_pair("layernorm" if old else "norm", "ln_post"),
        Ignored("embeddings.mask_token"),
    ]
    registers = "embeddings.register_tokens"
    table.append(_one(registers, "registers", 1) if layout.extra > 1 else Ignored(registers))
    if layout.table:
        table.append(_one("embeddings.position_embeddings", "position_table", 1))
    return table


def _one(theirs: str, ours: str, axes: int) -> Rule:
    """A tensor with ``axes`` leading axes of size 1 more than ours."""
    return Rule(
        theirs,
        ours,
        to_ours=lambda array: array.reshape(array.shape[axes:]),
        to_theirs=lambda array: array.reshape((1,) * axes + array.shape),
    )


def _pair(theirs: str, ours: str) -> list[Rule]:
    stack = "layer" if "{layer}" in theirs else None
    return [Rule(f"{theirs}.{name}", f"{ours}/{name}", stack=stack) for name in ("weight", "bias")]


def in_openai_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of a CLIP under OpenAI's names: queries, keys and values in one matrix, the projection transposed."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        **{f"pre_layrnorm.{name}": f"ln_pre.{name}" for name in ("weight", "bias")},
        **{f"post_layernorm.{name}": f"ln_post.{name}" for name in ("weight", "bias")},
    }
    blocks = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found = {}
    for key, tensor in encoder_tensors(tensors).items():
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if block is None:
            if key == "visual_projection.weight":
                tensor = Deferred(tensor.shape[::-1], tensor.dtype, lambda t=tensor: read_array(t).T)
            found[names.get(key, "proj" if key == "visual_projection.weight" else key)] = tensor
            continue
        number, part, kind = block.groups()
        root = f"transformer.resblocks.{number}."
        if part == "self_attn.q_proj":
            others = [tensors_of(tensors, key.replace("q_proj", name)) for name in ("k_proj", "v_proj")]
            found[f"{root}attn.in_proj_{kind}"] = _joined([tensor, *others])
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"{root}{blocks.get(part, part)}.{kind}"] = tensor
    return found


def tensors_of(tensors: Mapping[str, Any], key: str) -> Any:
    """A tensor by its name within the encoder. Raises ValueError if it is missing."""
    for root in ("vision_model.", ""):
        if root + key in tensors:
            return tensors[root + key]
    raise ValueError(f"the tensor {key} is missing")


def _joined(tensors: list[Any]) -> Deferred:
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return Deferred(shape, tensors[0].dtype, lambda: np.concatenate([read_array(tensor) for tensor in tensors]))
