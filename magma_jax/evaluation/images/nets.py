"""Networks for metrics of sets of images: pooled features and class probabilities of uint8 images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.evaluation.images.inception import look, read_inception
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.models.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.efficientnet_lite import read_classifier, read_weights
from magma_jax.typing import UInt8

# Images of a compiled program.
BATCH = 32


class Seen(NamedTuple):
    """What a network makes of images: features (N, C) and class probabilities (N, K)."""

    features: np.ndarray
    probabilities: np.ndarray


class ImageNet(NamedTuple):
    """A network: the name that its scores carry, and a function of uint8 images (N, H, W, 3)."""

    name: str
    look: Callable[[UInt8[np.ndarray, "N H W 3"]], Seen]


def efficientnet(side: int) -> ImageNet:
    """EfficientNet-Lite0 for square images of ``side`` pixels, a multiple of 32: mean of its last features.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    config = EfficientNetLiteConfig(image_size=side, taps=("head",))
    graphdef, shapes, _ = abstract(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    params, (weight, bias) = read_weights(shapes), read_classifier()

    @jax.jit
    def run(params: Any, images: Any) -> tuple[Any, Any]:
        features = merge(graphdef, params)(images).mean(1)
        return features, jax.nn.softmax(features @ jnp.asarray(weight).T + bias)

    def look(images: UInt8[np.ndarray, "N H W 3"]) -> Seen:
        return in_batches(lambda part: run(params, normalize_for(config, part)), images)

    return ImageNet("efficientnet_lite0", look)


def inception(path: str) -> ImageNet:
    """Inception v3 of 2015 with the official weights; errors as ``read_inception``."""
    weights = read_inception(path)
    return ImageNet("inception-2015-12-05", lambda images: in_batches(lambda part: look(weights, part), images))


def in_batches(run: Callable[[Any], tuple[Any, Any]], images: UInt8[np.ndarray, "N H W 3"]) -> Seen:
    """Results of all images; the last batch is padded with its last image, so that one program serves all."""
    parts = []
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        parts.append([np.asarray(array) for array in run(images[rows])])
    return Seen(*(np.concatenate(arrays)[: len(images)] for arrays in zip(*parts, strict=True)))
