"""Image encoders by ``kind``. A new kind takes one import and one row here.

An encoder is a module built as ``Encoder(config, rngs=...)`` and called as ``encoder(images, batch_norm=...,
remat=...)``. Its config has ``image_size``, ``channels`` and ``positions`` (None if it pools to one vector).
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from flax import nnx

from magma_jax.data.images import CLIP_MEAN, CLIP_STD, normalize
from magma_jax.models.vision.clip_resnet import CLIP_RESNETS, CLIPResNet, CLIPResNetConfig
from magma_jax.models.vision.clip_vit import CLIP_VITS, CLIPViT, CLIPViTConfig
from magma_jax.models.vision.efficientnet_lite import LITE_MEAN, LITE_STD, EfficientNetLite, EfficientNetLiteConfig
from magma_jax.models.vision.nf_resnet import NFResNet, NFResNetConfig
from magma_jax.models.vision.vit import VITS, DINOv2Config, DINOv3Config, SiglipConfig, VisionTransformer
from magma_jax.typing import Array, Float, UInt8

EncoderConfig: TypeAlias = (
    CLIPResNetConfig
    | CLIPViTConfig
    | NFResNetConfig
    | EfficientNetLiteConfig
    | SiglipConfig
    | DINOv2Config
    | DINOv3Config
)


class EncoderEntry(NamedTuple):
    """An encoder's class and the mean and standard deviation that its pixels (0 to 1) are normalised with."""

    module: type[nnx.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ENCODERS = {
    "clip_resnet": EncoderEntry(CLIPResNet, CLIP_MEAN, CLIP_STD),
    "clip_vit": EncoderEntry(CLIPViT, CLIP_MEAN, CLIP_STD),
    # timm's defaults for nf_resnet50: the ImageNet statistics.
    "nf_resnet": EncoderEntry(NFResNet, *_IMAGENET),
    "efficientnet_lite": EncoderEntry(EfficientNetLite, LITE_MEAN, LITE_STD),
    "siglip": EncoderEntry(VisionTransformer, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": EncoderEntry(VisionTransformer, *_IMAGENET),
    "dinov3": EncoderEntry(VisionTransformer, *_IMAGENET),
}


# Published sizes. A ViT's plain name gives the pooled token, as in the original code; "-grid" gives the patch tokens.
PUBLISHED_ENCODERS: dict[str, EncoderConfig] = {
    **CLIP_RESNETS,
    **CLIP_VITS,
    **{f"{name}-grid": dataclasses.replace(config, output="grid") for name, config in CLIP_VITS.items()},
    "nf_resnet50": NFResNetConfig(),
    "efficientnet_lite0": EfficientNetLiteConfig(),
    **VITS,
}


def build_encoder(config: EncoderConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The encoder of a config, with fresh weights."""
    module: Any = ENCODERS[config.kind].module
    return module(config, rngs=rngs)


def normalize_for(
    config: EncoderConfig, pixels: UInt8[Array | np.ndarray, "*batch H W 3"]
) -> Float[Any, "*batch H W 3"]:
    """Pixels of 0 to 255 normalised for the encoder of a config, fp32; NumPy arrays stay NumPy arrays."""
    entry = ENCODERS[config.kind]
    return normalize(pixels, entry.mean, entry.std)
