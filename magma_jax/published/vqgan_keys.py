"""Key table of VQ-GANs in taming-transformers' layout, alone or inside MAGVLT, for both directions."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig
from magma_jax.nn.modules import abstract
from magma_jax.published.infer_config import InferenceError, layer_count, tensor_shape
from magma_jax.published.keymap.engine import Ignored, KeyMapError, Rule, to_ours
from magma_jax.storage.deferred import Deferred
from magma_jax.storage.files import open_tensors

# Prefix of the keys inside a MAGVLT checkpoint.
MAGVLT_PREFIX = "model_vqvae."

# Discriminator and perceptual network of training, which taming's files hold too.
TRAINING = Ignored("loss.{name...}")


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


@contextlib.contextmanager
def open_vqgan(path: str | Path, config: VQGANConfig) -> Iterator[tuple[dict[str, Deferred], tuple[Path, ...]]]:
    """Opens a VQ-GAN's weights, from a file of its own or out of a MAGVLT checkpoint.

    Yields a lazy tensor for every parameter of ``config``, and the files.

    Raises:
        ConfigError: the file holds a VQ-GAN of other sizes, or none; the message says which.
        WeightFileError, TorchFileError: the file cannot be read. KeyMapError: its tensors do not match the model.
    """
    path = Path(path)
    with open_tensors(path) as weights:
        tensors = _tokenizer(weights.tensors)
        try:
            found = infer_vqgan_config(tensors, config.image_size)
        except InferenceError as error:
            raise ConfigError(f"{path}: {error}") from None
        if found != config:
            raise ConfigError(f"{path} holds {found}, but the config asks for {config}")
        shapes = abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[1]
        try:
            plan = to_ours([*vqgan_table(), TRAINING], tensors, shapes)
        except KeyMapError as error:
            raise KeyMapError(f"{path}: {error}") from None
        yield plan, weights.files


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
