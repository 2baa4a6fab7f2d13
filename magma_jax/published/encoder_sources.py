"""Published image encoders, renamed to the keys of ``magma_keys.encoder_table``.

Supported are OpenAI's CLIP (TorchScript archives or state dicts) and open_clip's (``visual.*`` beside a text tower),
both also without the prefix, Hugging Face's CLIP, SigLIP, SigLIP 2, DINOv2 and DINOv3 (``published.hf.encoders``), and
timm's ``nf_resnet50``. The sizes in the file are compared with the config; tables of positions are resized to its
``image_size``.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.foreign import read_json, shown
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder
from magma_jax.models.vision.clip_resnet import CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIPViTConfig
from magma_jax.models.vision.nf_resnet import NFResNetConfig
from magma_jax.models.vision.vit import DINOv2Config, ViTConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.hf.encoders import encoder_of, encoder_tensors, in_openai_names, vit_table
from magma_jax.published.hf.position_tables import Resize, resized_table
from magma_jax.published.infer_config import InferenceError, Known, encoder_config
from magma_jax.published.keymap.engine import Ignored, KeyMapError, to_ours
from magma_jax.published.magma_keys import encoder_table
from magma_jax.storage.deferred import Deferred, read_array
from magma_jax.storage.files import open_tensors

# Config fields that the weight file does not determine.
_FREE = {
    "clip_resnet": ("image_size", "embedding_width", "attention_pool"),
    "clip_vit": ("heads", "activation", "output", "embedding_width", "image_size"),
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
        folder = weights.files[0].parent
        if isinstance(config, ViTConfig):
            tensors = encoder_tensors(weights.tensors)
            _check_settings(folder / "config.json", config)
            patch = tensors.get("embeddings.patch_embedding.weight")
            flat = patch is not None and len(patch.shape) == 2
            table: list[Any] = vit_table(config, flat_patches=flat)
            registers = isinstance(config, DINOv2Config) and config.registers
            how = "smooth cubic" if registers else "smooth linear" if flat else "cubic"
            for key in ("embeddings.position_embedding.weight", "embeddings.position_embeddings"):
                tensors = _resized(path, tensors, key, config, how)
        else:
            tensors = _resized(path, _image_tower(weights.tensors), "positional_embedding", config, "cubic")
            _compare(path, tensors, config)
            _check_activation(folder / OPEN_CLIP_CONFIG, config)
            if isinstance(config, CLIPViTConfig):
                _check_settings(folder / "config.json", config)
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


def read_encoder_config(path: str | Path) -> EncoderConfig:
    """The config of a published SigLIP, DINO or CLIP from its ``config.json``; its output is the grid.

    Raises:
        ConfigError: no readable ``config.json``, or that of another model.
    """
    path = Path(path)
    return _published_config((path if path.is_dir() else path.parent) / "config.json")


def _published_config(file: Path) -> EncoderConfig:
    try:
        values = read_json(file)
        return encoder_of(values if isinstance(values, dict) else {})
    except OSError:
        raise ConfigError(f"{file}: no such file; an encoder's heads stand in it, fetch it too") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_settings(file: Path, config: EncoderConfig) -> None:
    """Compares with a ``config.json`` beside the weights, if it is that of an encoder."""
    if not file.is_file():
        return
    if isinstance(config, CLIPViTConfig):
        values = read_json(file)
        if not isinstance(values, dict) or values.get("model_type") not in ("clip", "clip_vision_model"):
            return
    found = _published_config(file)
    if found.kind != config.kind:
        raise ConfigError(f"{file}: describes a {found.kind}, but the config's encoder is a {config.kind}")
    free = ("image_size", "output", *(("embedding_width",) if config.positions is not None else ()))
    _refuse_differing(file, found, config, [f.name for f in dataclasses.fields(config) if f.name not in free])


def _resized(path: Path, tensors: dict[str, Any], key: str, config: EncoderConfig, how: Resize) -> dict[str, Any]:
    """The tensors with the table of positions for the config's ``image_size``."""
    if key not in tensors or not isinstance(config, ViTConfig | CLIPViTConfig):
        return tensors
    tensor, side = tensors[key], config.image_size // config.patch
    *lead, rows, width = tensor.shape
    extra = 0 if config.kind == "siglip" else 1
    old = math.isqrt(max(rows - extra, 0))
    if old * old != rows - extra:
        raise ConfigError(f"{path}: {key} has {rows} rows, which are no square and {extra} more")
    if old == side:
        return tensors

    def read() -> Any:
        table = read_array(tensor).reshape(rows, width)
        return np.concatenate([table[:extra], resized_table(table[extra:], side, how)]).reshape(*lead, -1, width)

    return tensors | {key: Deferred((*lead, side * side + extra, width), tensor.dtype, read)}


def _image_tower(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of the encoder under CLIP's names, or under the original's for an NF-ResNet."""
    # open_clip's training checkpoints of a model wrapped for data parallelism.
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if any(key.startswith("vision_model.embeddings.class") for key in tensors):
        return in_openai_names(tensors)
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
    free = _FREE[config.kind]
    _refuse_differing(path, found, config, [f.name for f in dataclasses.fields(config) if f.name not in free])


def _refuse_differing(path: Path, found: EncoderConfig, config: EncoderConfig, fields: list[str]) -> None:
    differing = [
        f"{name} {getattr(found, name)}, not {getattr(config, name)}"
        for name in fields
        if getattr(found, name) != getattr(config, name)
    ]
    if differing:
        raise ConfigError(f"{path}: does not fit model.encoder of the config: it has {', '.join(differing)}")


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
