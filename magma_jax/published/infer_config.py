"""Infers a model's config from the names and shapes of its tensors.

Sizes, adapters and vocabularies follow from the tensors; heads, rotary size and context length from the buffers that
the original stores. Other values come from a model config file, see ``model_config_keys``, or from the published model
of the same sizes; the latter are reported in one line.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import numpy as np

from magma_jax.foreign import shown
from magma_jax.models.language.decoder import MAX_LAYERS
from magma_jax.models.language.gptj import GPTJConfig
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.catalog import EncoderConfig
from magma_jax.models.vision.clip_resnet import CLIP_RESNETS, CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIP_VITS, CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.adapters import AdapterActivation, AdapterConfig


class InferenceError(ValueError):
    """Tensors that are not a MAGMA model, or from which its sizes cannot be inferred."""


class Known:
    """Values of a model config file, and notes on the values that were assumed."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.assumed: list[str] = []

    def get(self, part: str, name: str, default: Any, reason: str | None = None, choices: Collection[Any] = ()) -> Any:
        """Value from the file, else the default, which is noted as assumed if a ``reason`` is given."""
        if (value := (self.values.get(part) or {}).get(name)) is not None:
            if not isinstance(value, type(default)) or isinstance(value, bool):
                raise InferenceError(f"{part}.{name} must be of type {type(default).__name__}, got {shown(value)}")
            if choices and value not in choices:
                raise InferenceError(f"{part}.{name} {shown(value)} is not one of {', '.join(map(repr, choices))}")
            return value
        if reason is not None:
            self.assumed.append(f"{part}.{name} {default} ({reason})")
        return default


def infer_config(
    tensors: Mapping[str, Any],
    model_config: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> MagmaConfig:
    """Infers the config of a MAGMA state dict.

    Args:
        tensors: keys of the published layout to tensors with ``shape`` and ``read()``.
        model_config: values that cannot be inferred, see ``model_config_keys``; they override the buffers.
        say: called with one line that lists the values assumed from the published models.

    Raises:
        InferenceError: a required value is missing; the message names it.
    """
    known = Known(model_config or {})
    try:
        config = _infer(tensors, known)
    except InferenceError:
        raise
    # Impossible sizes, from corrupt or hostile tensors.
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise InferenceError(f"its tensors do not describe a model ({error})") from None
    if known.assumed:
        say(f"the tensors do not tell {', '.join(known.assumed)}; --model-config sets what differs")
    return config


def _infer(tensors: Mapping[str, Any], known: Known) -> MagmaConfig:
    lm = _language_model(tensors, known)
    proj = tensor_shape(tensors, "image_prefix.proj.weight")
    encoder = encoder_config(tensors, known, "image_prefix.enc.", features=proj[1])
    pooled = encoder.positions is None
    if not pooled and proj[0] != lm.width:
        raise InferenceError(
            f"image_prefix.proj.weight maps to {proj[0]} features, but the language model has width {lm.width}"
        )
    prefix = PrefixConfig(
        image_positions=proj[0] // lm.width if pooled else PrefixConfig.image_positions,
        layernorm="image_prefix.ln.weight" in tensors,
    )
    classes = tensor_shape(tensors, "class_head.weight")[0] if "class_head.weight" in tensors else 0
    return MagmaConfig(
        lm=lm,
        encoder=encoder,
        prefix=prefix,
        mlp_adapter=_adapter(tensors, "mlp", lm.width, known),
        attn_adapter=_adapter(tensors, "attn", lm.width, known),
        classes=classes,
    )


def _language_model(tensors: Mapping[str, Any], known: Known) -> GPTJConfig:
    layers = layer_count(tensors, r"lm\.transformer\.h\.(\d+)\.ln_1\.weight")
    if not layers:
        raise InferenceError(
            "holds no lm.transformer.h.N.ln_1.weight: not a MAGMA checkpoint in the published layout"
            f"{_prefix_hint(tensors)}"
        )
    vocab_rows, width = tensor_shape(tensors, "lm.transformer.wte.weight")
    buffers = {
        name: next((tensors[key] for key in tensors if re.fullmatch(rf"lm\..*\.attention\.{name}", key)), None)
        for name in ("scale_attn", "sin")
    }
    heads, rotary, context = (known.get("lm", name, 0) for name in ("n_heads", "rotary_dim", "seq_len"))
    if buffers["scale_attn"] is not None and not heads:
        # The buffer is the square root of the head size.
        heads = round(width / float(np.asarray(buffers["scale_attn"].read(), np.float64)) ** 2)
    if buffers["sin"] is not None:
        rotary = rotary or 2 * buffers["sin"].shape[1]
        context = context or buffers["sin"].shape[0]
    context = context or known.get("lm", "seq_len", GPTJConfig.context_length, "as GPT-J")
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
        heads=heads,
        rotary_dim=rotary,
        feed_forward=tensor_shape(tensors, fc or "lm.transformer.h.0.mlp.c_fc.weight")[0],
        vocab_rows=vocab_rows,
        head_rows=tensor_shape(tensors, "lm.lm_head.weight")[0],
        context_length=context,
        layernorm_eps=known.get("lm", "layernorm_eps", GPTJConfig.layernorm_eps),
    )


def _adapter(tensors: Mapping[str, Any], place: str, width: int, known: Known) -> AdapterConfig | None:
    head = f"lm.transformer.h.0.{place}."
    nested = f"{head}1.adapter." if f"{head}1.adapter.0.weight" in tensors else f"{head}adapter."
    if f"{nested}0.weight" not in tensors:
        return None
    # With a LayerNorm (its weight is a vector), the bottleneck's index is one higher.
    layernorm = len(tensors[f"{nested}0.weight"].shape) == 1
    bottleneck = tensor_shape(tensors, f"{nested}{int(layernorm)}.weight")[0]
    parallel = any(key.startswith(f"{head}module.") for key in tensors)
    scaled = f"{head}adapter_scale" in tensors
    kind = "scaled_parallel" if scaled else "parallel" if parallel else "normal"
    factor = width // max(bottleneck, 1)
    if not factor or width // factor != bottleneck:
        raise InferenceError(f"{nested}: a bottleneck of {bottleneck} does not divide the width {width}")
    activation = known.get("adapter", "activation", AdapterConfig.activation, choices=get_args(AdapterActivation))
    return AdapterConfig(kind, factor, layernorm, activation)


def encoder_config(
    tensors: Mapping[str, Any], known: Known, root: str = "", features: int | None = None
) -> EncoderConfig:
    """Infers the config of an encoder whose keys begin with ``root``, under CLIP's or the original's names.

    ``features`` is the expected output width; it distinguishes a vision transformer's pooled output from the grid.

    Raises:
        InferenceError: an unsupported encoder, or a required value that is not in ``known``.
    """
    if f"{root}layer1.0.conv1.weight" in tensors:
        counts = [layer_count(tensors, rf"{re.escape(root)}layer{i}\.(\d+)\.conv1\.weight") for i in range(1, 5)]
        blocks = (counts[0], counts[1], counts[2], counts[3])
        width = tensor_shape(tensors, f"{root}conv3.weight", 4)[0]
        sizes = {(c.blocks, c.width): (name, c) for name, c in CLIP_RESNETS.items()}
        if (published := sizes.get((blocks, width))) is None:
            size = _asked(known, "res", f"a CLIP ResNet of blocks {blocks} and width {width}", "image size", "pixels")
            return CLIPResNetConfig(blocks, width, image_size=size)
        name, base = published
        return dataclasses.replace(base, image_size=known.get("encoder", "res", base.image_size, f"as CLIP's {name}"))
    if f"{root}class_embedding" in tensors:
        width, _, patch, _ = tensor_shape(tensors, f"{root}conv1.weight", 4)
        pooled = f"{root}proj" in tensors and features not in (None, width)
        rows = tensor_shape(tensors, f"{root}positional_embedding")[0] - 1
        layers = layer_count(tensors, rf"{re.escape(root)}transformer\.resblocks\.(\d+)\.ln_1\.weight")
        if (side := math.isqrt(max(rows, 0))) ** 2 != rows:
            raise InferenceError(f"{root}positional_embedding has {rows + 1} rows, which is not a square plus one")
        sizes = {(c.layers, c.width, c.patch): (name, c) for name, c in CLIP_VITS.items()}
        if (published := sizes.get((layers, width, patch))) is None:
            model = f"a vision transformer of {layers} layers, width {width} and patches of {patch}"
            heads = _asked(known, "heads", model, "head count", "N")
        else:
            name, base = published
            heads = known.get("encoder", "heads", base.heads, f"as CLIP's {name}")
        return CLIPViTConfig(
            layers=layers,
            width=width,
            heads=heads,
            patch=patch,
            image_size=side * patch,
            embedding_width=tensor_shape(tensors, f"{root}proj")[1] if pooled else CLIPViTConfig.embedding_width,
            activation=known.get(
                "encoder",
                "activation",
                CLIPViTConfig.activation,
                "as OpenAI's, others use gelu",
                choices=("quick_gelu", "gelu"),
            ),
            output="pooled" if pooled else "grid",
            layer_scale=f"{root}transformer.resblocks.0.ls_1.gamma" in tensors,
        )
    if f"{root}0.0.conv.weight" in tensors:
        stages = range(4)
        return NFResNetConfig(
            blocks=tuple(layer_count(tensors, rf"{re.escape(root)}0\.1\.{i}\.(\d+)\.conv1\.weight") for i in stages),
            stage_channels=tuple(tensor_shape(tensors, f"{root}0.1.{i}.0.conv3.weight", 4)[0] for i in stages),
            stem_channels=tensor_shape(tensors, f"{root}0.0.conv.weight", 4)[0],
            image_size=known.get("encoder", "res", NFResNetConfig.image_size, "as timm's nf_resnet50"),
        )
    raise InferenceError(f"{root}* is neither a CLIP ResNet, a CLIP ViT nor an NF-ResNet")


def _asked(known: Known, name: str, model: str, what: str, unit: str) -> int:
    if not (value := known.get("encoder", name, 0)):
        hint = f'give --model-config with {{"encoder": {{"{name}": {unit}}}}}'
        raise InferenceError(f"{model} is not a published one, so its {what} is unknown; {hint}")
    return value


def _prefix_hint(tensors: Mapping[str, Any]) -> str:
    """Hint with the prefix that a wrapper added to every key, else with the first keys."""
    wrapped = re.compile(r"((?:\w+\.)+)lm\.transformer\.h\.0\.ln_1\.weight")
    prefix = next((match[1] for key in tensors if (match := wrapped.fullmatch(key))), None)
    if prefix is not None:
        return (
            f"; its keys begin with {prefix!r}, which a wrapper such as DistributedDataParallel or torch.compile adds: "
            "save the state dict of the module inside the wrapper, or cut that off every key"
        )
    return f"; its tensors are {', '.join(map(shown, list(tensors)[:3]))} ..."


def layer_count(tensors: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that ``pattern`` captures in the keys; 0 if no key matches.

    Raises:
        InferenceError: more layers than any model has.
    """
    # Ten digits suffice; Python refuses to convert thousands.
    found = [int(match[1][:10]) for key in tensors if (match := re.fullmatch(pattern, key))]
    count = max(found, default=-1) + 1
    if count > MAX_LAYERS:
        raise InferenceError(f"it has a layer of number {count - 1}, but no model has more than {MAX_LAYERS}")
    return count


def tensor_shape(tensors: Mapping[str, Any], key: str, axes: int = 2) -> tuple[int, ...]:
    """Shape of a tensor. Raises InferenceError if it is missing or has another number of axes."""
    if key not in tensors:
        raise InferenceError(f"the tensor {key} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != axes:
        raise InferenceError(f"the tensor {key} has shape {list(shape)}, but should have {axes} axes")
    return shape
