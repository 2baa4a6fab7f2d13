"""A model's config from the names and shapes of its tensors.

Sizes, adapters and vocabularies are in the tensors; heads, rotary size and context are in the buffers that the
original stores. What is in neither (the head count of a vision transformer, an unpublished picture size) comes from a
model config file, see ``MODEL_CONFIG_KEYS``.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.catalog import EncoderConfig
from magma_jax.models.vision.clip_resnet import CLIP_RESNETS, CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.adapters import AdapterConfig

# What a model config file may hold, as in the .json beside a golden file; other keys are ignored there.
MODEL_CONFIG_KEYS = {"lm": ("n_heads", "rotary_dim", "seq_len"), "encoder": ("res", "heads")}


class InferenceError(ValueError):
    """Tensors that are not a MAGMA model, or whose sizes cannot be told from them."""


def infer_config(tensors: Mapping[str, Any], model_config: Mapping[str, Any] | None = None) -> MagmaConfig:
    """Infers the config of a MAGMA state dict.

    Args:
        tensors: keys of the published layout to tensors with ``shape`` and ``read()``.
        model_config: what tensors cannot tell, see ``MODEL_CONFIG_KEYS``; it wins over the buffers.

    Raises:
        InferenceError: something needed is missing; the message names it.
    """
    known = model_config or {}
    lm = _language_model(tensors, known.get("lm") or {})
    proj = _shape(tensors, "image_prefix.proj.weight")
    encoder = encoder_config(tensors, known.get("encoder") or {}, "image_prefix.enc.", features=proj[1])
    pooled = encoder.positions is None
    if not pooled and proj[0] != lm.width:
        raise InferenceError(
            f"image_prefix.proj.weight maps to {proj[0]} features, but the language model has width {lm.width}"
        )
    prefix = PrefixConfig(
        image_positions=proj[0] // lm.width if pooled else PrefixConfig.image_positions,
        layernorm="image_prefix.ln.weight" in tensors,
    )
    classes = _shape(tensors, "class_head.weight")[0] if "class_head.weight" in tensors else 0
    return MagmaConfig(
        lm=lm,
        encoder=encoder,
        prefix=prefix,
        mlp_adapter=_adapter(tensors, "mlp", lm.width),
        attn_adapter=_adapter(tensors, "attn", lm.width),
        classes=classes,
    )


def _language_model(tensors: Mapping[str, Any], known: Mapping[str, Any]) -> GPTJConfig:
    layers = _count(tensors, r"lm\.transformer\.h\.(\d+)\.ln_1\.weight")
    if not layers:
        raise InferenceError("holds no lm.transformer.h.N.ln_1.weight: not a MAGMA checkpoint in the published layout")
    vocab_rows, width = _shape(tensors, "lm.transformer.wte.weight")
    buffers = {
        name: next((tensors[key] for key in tensors if re.fullmatch(rf"lm\..*\.attention\.{name}", key)), None)
        for name in ("scale_attn", "sin")
    }
    heads, rotary, context = known.get("n_heads"), known.get("rotary_dim"), known.get("seq_len")
    if buffers["scale_attn"] is not None and heads is None:
        # The buffer is the square root of the head size.
        heads = round(width / float(np.asarray(buffers["scale_attn"].read(), np.float64)) ** 2)
    if buffers["sin"] is not None:
        rotary = rotary or 2 * buffers["sin"].shape[1]
        context = context or buffers["sin"].shape[0]
    missing = [name for name, value in (("n_heads", heads), ("rotary_dim", rotary)) if not value]
    if missing:
        raise InferenceError(
            f"the tensors do not tell {' and '.join(missing)} of the language model; "
            'give --model-config with {"lm": {"n_heads": ..., "rotary_dim": ...}}'
        )
    fc = next((k for k in tensors if re.fullmatch(r"lm\.transformer\.h\.0\.mlp\..*c_fc\.weight", k)), None)
    return GPTJConfig(
        layers=layers,
        width=width,
        heads=int(heads),
        rotary_dim=int(rotary),
        feed_forward=_shape(tensors, fc or "lm.transformer.h.0.mlp.c_fc.weight")[0],
        vocab_rows=vocab_rows,
        head_rows=_shape(tensors, "lm.lm_head.weight")[0],
        context_length=int(context or GPTJConfig.context_length),
    )


def _adapter(tensors: Mapping[str, Any], place: str, width: int) -> AdapterConfig | None:
    head = f"lm.transformer.h.0.{place}."
    nested = f"{head}1.adapter." if f"{head}1.adapter.0.weight" in tensors else f"{head}adapter."
    if f"{nested}0.weight" not in tensors:
        return None
    # A LayerNorm's weight is a vector; the bottleneck is then one place further.
    layernorm = len(tensors[f"{nested}0.weight"].shape) == 1
    bottleneck = _shape(tensors, f"{nested}{int(layernorm)}.weight")[0]
    parallel = any(key.startswith(f"{head}module.") for key in tensors)
    scaled = f"{head}adapter_scale" in tensors
    kind = "scaled_parallel" if scaled else "parallel" if parallel else "normal"
    factor = width // max(bottleneck, 1)
    if not factor or width // factor != bottleneck:
        raise InferenceError(f"{nested}: a bottleneck of {bottleneck} is no whole part of the width {width}")
    return AdapterConfig(kind, factor, layernorm)


def encoder_config(
    tensors: Mapping[str, Any], known: Mapping[str, Any], root: str = "", features: int | None = None
) -> EncoderConfig:
    """Infers the config of an encoder whose keys begin with ``root``, in CLIP's or the original's names.

    ``features`` is the width that its user expects; it tells a vision transformer's pooled output from the grid.

    Raises:
        InferenceError: another encoder, or one whose picture size must be ``known``.
    """
    if f"{root}layer1.0.conv1.weight" in tensors:
        blocks = tuple(_count(tensors, rf"{re.escape(root)}layer{i}\.(\d+)\.conv1\.weight") for i in range(1, 5))
        width = _shape(tensors, f"{root}conv3.weight", 4)[0]
        sizes = {(c.blocks, c.width): c for c in CLIP_RESNETS.values()}
        published = sizes.get((blocks, width))
        if published is None and "res" not in known:
            raise InferenceError(
                f"a CLIP ResNet of blocks {blocks} and width {width} is not a published one, so its picture size "
                'is unknown; give --model-config with {"encoder": {"res": pixels}}'
            )
        base = published or CLIPResNetConfig(blocks, width)
        return dataclasses.replace(base, image_size=int(known.get("res", base.image_size)))
    if f"{root}class_embedding" in tensors:
        width, _, patch, _ = _shape(tensors, f"{root}conv1.weight", 4)
        pooled = f"{root}proj" in tensors and features not in (None, width)
        side = round((_shape(tensors, f"{root}positional_embedding")[0] - 1) ** 0.5)
        return CLIPViTConfig(
            layers=_count(tensors, rf"{re.escape(root)}transformer\.resblocks\.(\d+)\.ln_1\.weight"),
            width=width,
            heads=int(known.get("heads", width // 64)),  # every published CLIP has heads of 64
            patch=patch,
            image_size=side * patch,
            embedding_width=_shape(tensors, f"{root}proj")[1] if pooled else CLIPViTConfig.embedding_width,
            output="pooled" if pooled else "grid",
        )
    if f"{root}0.0.conv.weight" in tensors:
        stages = range(4)
        return NFResNetConfig(
            blocks=tuple(_count(tensors, rf"{re.escape(root)}0\.1\.{i}\.(\d+)\.conv1\.weight") for i in stages),
            stage_channels=tuple(_shape(tensors, f"{root}0.1.{i}.0.conv3.weight", 4)[0] for i in stages),
            stem_channels=_shape(tensors, f"{root}0.0.conv.weight", 4)[0],
            image_size=int(known.get("res", NFResNetConfig.image_size)),
        )
    raise InferenceError(f"{root}* is neither a CLIP ResNet, a CLIP ViT nor an NF-ResNet")


def _count(tensors: Mapping[str, Any], pattern: str) -> int:
    found = [int(match[1]) for key in tensors if (match := re.fullmatch(pattern, key))]
    return max(found, default=-1) + 1


def _shape(tensors: Mapping[str, Any], key: str, axes: int = 2) -> tuple[int, ...]:
    if key not in tensors:
        raise InferenceError(f"the tensor {key} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes:
        raise InferenceError(f"the tensor {key} has shape {list(shape)}, but should have {axes} axes")
    return shape
