"""Key table of VQ-GANs in taming-transformers' layout, alone or inside MAGVLT, for both directions."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.config import ConfigError, from_dict
from magma_jax.foreign import ForeignError, parse_json, shown
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.infer_config import InferenceError, layer_count, tensor_shape
from magma_jax.published.keymap.engine import Ignored, KeyMapError, Rule, to_ours
from magma_jax.published.keymap.stored_dtypes import in_stored_dtypes
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import Weights, open_tensors
from magma_jax.storage.model_folder import in_dtype

# Prefix of the keys inside a MAGVLT checkpoint.
MAGVLT_PREFIX = "model_vqvae."

# Discriminator and perceptual network of training, which taming's files hold too.
TRAINING = Ignored("loss.{name...}")

MAX_RESOLUTION = 65536

# Metadata key of a safetensors file with our paths, such as the quick start's tokenizer: the config, as JSON.
CONFIG_KEY = "vqgan_config"


def vqgan_table(theirs: str = "", ours: str = "") -> list[Rule]:
    """Key table of a VQ-GAN, with key prefix ``theirs`` and path prefix ``ours``."""
    names = {"quantize.embedding.weight": "codebook/weight"}
    for conv in ("quant_conv", "post_quant_conv"):
        names[f"{conv}.{{name...}}"] = f"{conv}/{{name...}}"
    for half, level, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for part in ("conv_in", "conv_out", "norm_out", "mid"):
            names[f"{half}.{part}.{{name...}}"] = f"{half}/{part}/{{name...}}"
        for block in ("block", "attn"):
            names[f"{half}.{level}.{{i}}.{block}.{{j}}.{{name...}}"] = f"{half}/{level}{{i}}/{block}{{j}}/{{name...}}"
        names[f"{half}.{level}.{{i}}.{resample}.conv.{{name...}}"] = f"{half}/{resample}{{i}}/{{name...}}"
    return [Rule(theirs + key, ours + path) for key, path in names.items()]


@dataclasses.dataclass(frozen=True)
class OpenVQGAN:
    """VQ-GAN with lazy parameters.

    Attributes:
        config: its sizes.
        params: path to ``Deferred``; valid inside the block that opened them.
        source: data with which a file of the same keys in the same order is written: ``prefix`` and order of its
            ``keys``, and ``counters``, the values beside the weights.
        dropped: names of the file's other tensors; in a tokenizer's own file those of the original's training.
        files: files of the parameters.
    """

    config: VQGANConfig
    params: dict[str, Deferred]
    source: dict[str, Any]
    dropped: tuple[str, ...]
    files: tuple[Path, ...]


def is_vqgan(keys: Collection[str]) -> bool:
    """Whether tensors of these names are a VQ-GAN and nothing else: in taming's layout, with or without MAGVLT's
    prefix, or with our paths.

    Tensors of training, which taming's files hold too, are allowed.
    """
    if {"codebook/weight", "encoder/conv_in/weight"} <= set(keys):
        return True
    names = [key.removeprefix(MAGVLT_PREFIX) for key in keys]
    own = [name for name in names if not name.startswith("loss.")]
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    return {"quantize.embedding.weight", "encoder.conv_in.weight"} <= set(own) and all(
        key.startswith(parts) for key in own
    )


@functools.lru_cache(maxsize=16)
def tokenizer_shapes(config: VQGANConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, by path."""
    return abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[1]


@contextlib.contextmanager
def open_torch_vqgan(
    path: str | Path, model_config: Mapping[str, Any] | None = None, dtype: str | None = None
) -> Iterator[OpenVQGAN]:
    """Opens a VQ-GAN in taming's layout, alone or with the prefix that it has inside MAGVLT.

    Args:
        path: anything that ``open_tensors`` opens.
        model_config: ``{"image_tokenizer": {"resolution": ...}}``, which tensors cannot tell; default: that of the
            file's own ``config``, or 256.
        dtype: dtype of all parameters; default: the file's.

    Raises:
        InferenceError: the file holds no VQ-GAN, or one that ``VQGANConfig`` cannot express. WeightFileError,
        TorchFileError: it cannot be read. KeyMapError: its tensors do not match the model.
    """
    with open_tensors(path) as weights:
        inside = any(key.startswith(MAGVLT_PREFIX) for key in weights.tensors)
        prefix = MAGVLT_PREFIX if inside else ""
        tensors, table = _tokenizer(weights.tensors), [*vqgan_table(), TRAINING]
        try:
            config = infer_vqgan_config(tensors, _resolution(model_config or {}, weights.others))
            shapes = tokenizer_shapes(config)
            target = in_stored_dtypes(shapes, table, tensors) if dtype is None else in_dtype(shapes, dtype)
            plan = to_ours(table, tensors, target)
        except (InferenceError, KeyMapError) as error:
            raise type(error)(f"{path}: {error}") from None
        kept = dict.fromkeys(prefix + key for key in tensors if not key.startswith("loss."))
        dropped = tuple(key for key in weights.tensors if key not in kept)
        source = {
            "prefix": prefix,
            "keys": list(kept),
            "counters": {} if weights.metadata_is_text else weights.others,
        }
        yield OpenVQGAN(config, plan, source, dropped, weights.files)


def read_our_vqgan(weights: Weights) -> VQGANConfig | None:
    """The config of an open safetensors file whose tensors have our paths; None for other files.

    Raises:
        ConfigError: an invalid config, or tensors that do not fit it.
    """
    described = weights.others.get(CONFIG_KEY) if weights.metadata_is_text else None
    if not isinstance(described, str):
        return None
    try:
        config = from_dict(VQGANConfig, parse_json(described), CONFIG_KEY)
    except ForeignError as error:
        raise ConfigError(f"its {CONFIG_KEY} {error}") from None
    shapes = tokenizer_shapes(config)
    misfits = [path for path in shapes if path not in weights.tensors]
    misfits += [path for path in shapes if path not in misfits and weights.tensors[path].shape != shapes[path].shape]
    if misfits:
        raise ConfigError(f"its tensors do not fit its config in {', '.join(misfits[:5])}")
    return config


@contextlib.contextmanager
def open_vqgan(path: str | Path, config: VQGANConfig) -> Iterator[tuple[dict[str, Deferred], tuple[Path, ...]]]:
    """Opens a VQ-GAN's weights, from a file of its own or out of a MAGVLT checkpoint.

    Yields a lazy tensor for every parameter of ``config``, and the files.

    Raises:
        ConfigError: the file holds a VQ-GAN of other sizes, or none; the message says which.
        WeightFileError, TorchFileError: the file cannot be read. KeyMapError: its tensors do not match the model.
    """
    settings = {"image_tokenizer": {"resolution": config.image_size}}
    try:
        with open_torch_vqgan(path, settings, "float32") as model:
            if model.config != config:
                raise ConfigError(f"{path} holds {model.config}, but the config asks for {config}")
            yield model.params, model.files
    except InferenceError as error:
        raise ConfigError(str(error)) from None


def infer_vqgan_config(tensors: Mapping[str, Any], image_size: int = VQGANConfig.image_size) -> VQGANConfig:
    """Sizes of a VQ-GAN from its tensors, under taming's keys.

    ``image_size`` is not in the tensors; it only names the levels with attention.

    Raises:
        InferenceError: not a VQ-GAN, or one that ``VQGANConfig`` cannot express.
    """
    width = tensor_shape(tensors, "encoder.conv_in.weight", 4)[0]
    levels = layer_count(tensors, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    channels = [tensor_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    if any(not width or count % width for count in channels):
        raise InferenceError(f"the levels have {channels} channels, which are not multiples of the first {width}")
    codes, code_width = tensor_shape(tensors, "quantize.embedding.weight")
    try:
        return VQGANConfig(
            image_size=image_size,
            width=width,
            multipliers=tuple(count // width for count in channels),
            blocks=layer_count(tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
            attention_sizes=tuple(
                image_size >> i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in tensors
            ),
            latent_channels=tensor_shape(tensors, "quant_conv.weight", 4)[1],
            code_width=code_width,
            codes=codes,
        )
    except ValueError as error:
        raise InferenceError(f"its tensors do not describe a VQ-GAN ({error})") from None


def _tokenizer(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors of the tokenizer inside a MAGVLT checkpoint, or all tensors."""
    inside = {key.removeprefix(MAGVLT_PREFIX): value for key, value in tensors.items() if key.startswith(MAGVLT_PREFIX)}
    return inside or tensors


def _resolution(model_config: Mapping[str, Any], others: Mapping[Any, Any]) -> int:
    stored = others.get("config")
    stored = stored.get("resolution") if isinstance(stored, Mapping) else None
    size = (model_config.get("image_tokenizer") or {}).get("resolution", stored)
    if size is None:
        return VQGANConfig.image_size
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= MAX_RESOLUTION:
        raise InferenceError(
            f"image_tokenizer.resolution is a number of pixels up to {MAX_RESOLUTION}, got {shown(size)}"
        )
    return size
