"""Published image encoders, renamed to the keys of ``magma_keys.encoder_table``.

Supported are OpenAI's CLIP (TorchScript archives or state dicts) and open_clip's (``visual.*`` beside a text tower),
both also without the prefix, and timm's ``nf_resnet50``. The sizes in the file are compared with the config.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.foreign import read_json, shown
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.infer_config import InferenceError, Known, encoder_config
from magma_jax.published.keymap.engine import Ignored, KeyMapError, to_ours
from magma_jax.published.magma_keys import encoder_table
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import open_tensors

# Config fields that the weight file does not determine.
_FREE = {
    "clip_resnet": ("image_size", "embedding_width", "attention_pool"),
    "clip_vit": ("heads", "activation", "output", "embedding_width"),
    "nf_resnet": ("image_size", "alpha"),
}

# Settings file beside open_clip's weights.
OPEN_CLIP_CONFIG = "open_clip_config.json"


@contextlib.contextmanager
def open_encoder(path: str | Path, config: EncoderConfig) -> Iterator[tuple[dict[str, Deferred], tuple[Path, ...]]]:
    """Opens an encoder's weights: a lazy tensor for every parameter of ``config``, and the files.

    Raises:
        ConfigError: the file holds an encoder of another kind or size; the message says which.
        WeightFileError, TorchFileError: the file cannot be read. KeyMapError: its tensors do not match the encoder.
    """
    path = Path(path)
    with open_tensors(path) as weights:
        tensors = _image_tower(weights.tensors)
        _compare(path, tensors, config)
        _check_activation(weights.files[0].parent / OPEN_CLIP_CONFIG, config)
        table = encoder_table(config)
        if isinstance(config, CLIPResNetConfig) and not config.attention_pool:
            table.append(Ignored("attnpool.{name...}"))
        if isinstance(config, NFResNetConfig):
            table.append(Ignored("head.{name...}"))  # ImageNet's classifier
        shapes = abstract(lambda: build_encoder(config, rngs=nnx.Rngs(0)))[1]
        try:
            plan = to_ours(table, tensors, shapes)
        except KeyMapError as error:
            raise KeyMapError(f"{path}: {error}") from None
        yield plan, weights.files


def _image_tower(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of the encoder under CLIP's names, or under the original's for an NF-ResNet."""
    # open_clip's training checkpoints of a model wrapped for data parallelism.
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    tower = {key.removeprefix("visual."): tensor for key, tensor in tensors.items() if key.startswith("visual.")}
    if tower:
        return tower
    if "stem.conv.weight" in tensors:
        names = {"stem": "0.0", "stages": "0.1"}
        parts = [(key.partition("."), tensor) for key, tensor in tensors.items()]
        return {f"{names.get(first, first)}.{rest}": tensor for (first, _, rest), tensor in parts}
    return dict(tensors)


def _compare(path: Path, tensors: Mapping[str, Any], config: EncoderConfig) -> None:
    fields = {"res": "image_size", "heads": "heads", "activation": "activation"}
    settings = {name: getattr(config, field) for name, field in fields.items() if hasattr(config, field)}
    known = Known({"encoder": settings})
    pooled = isinstance(config, CLIPViTConfig) and config.output == "pooled"
    try:
        found = encoder_config(tensors, known, features=config.channels if pooled else None)
    # All but InferenceError: impossible sizes.
    except (InferenceError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        names = ", ".join(map(shown, list(tensors)[:3]))
        raise ConfigError(f"{path}: no encoder that is known here, its tensors are {names} ... ({error})") from None
    if found.kind != config.kind:
        raise ConfigError(f"{path}: holds a {found.kind}, but the config's encoder is a {config.kind}")
    fields = [field.name for field in dataclasses.fields(config) if field.name not in _FREE[config.kind]]
    differing = [
        f"{name} {getattr(found, name)}, not {getattr(config, name)}"
        for name in fields
        if getattr(found, name) != getattr(config, name)
    ]
    if differing:
        hint = "; position embeddings are not interpolated" if any("image_size" in line for line in differing) else ""
        raise ConfigError(f"{path}: does not fit model.encoder of the config: it has {', '.join(differing)}{hint}")


def _check_activation(settings: Path, config: EncoderConfig) -> None:
    if not isinstance(config, CLIPViTConfig) or not settings.is_file():
        return
    try:
        quick = read_json(settings)["model_cfg"].get("quick_gelu", False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{settings}: not the settings of an open_clip model ({error}); fetch it again") from None
    wanted = "quick_gelu" if quick else "gelu"
    if config.activation != wanted:
        raise ConfigError(f"{settings}: its model uses {wanted}; set model.encoder.activation to it")
