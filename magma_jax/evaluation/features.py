"""Features of images by networks whose weights an installed package has, for metrics that compare sets of images."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from magma_jax.models.vision.catalog import normalize_for
from magma_jax.models.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.efficientnet_lite import read_weights
from magma_jax.typing import Float, UInt8

# Images of a compiled program.
BATCH = 32
# Layers early and late: the last ones alone lose colours and small shapes.
TAPS = (4, 10, "head")

Features = Callable[[UInt8[np.ndarray, "N H W 3"]], Float[np.ndarray, "N C"]]


def efficientnet_features(images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N C"]:
    """EfficientNet-Lite0's features of square images whose side is a multiple of 32, every grid cell's in a row.

    Raises:
        ValueError: images of other sizes. FileNotFoundError: the package with the weights is not installed.
    """
    side = images.shape[1]
    if images.shape[2] != side or side % 32:
        raise ValueError(f"images of {side} x {images.shape[2]} pixels: the sides must be equal and a multiple of 32")
    config, program = _efficientnet(side)
    parts = []
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        parts.append(np.asarray(program(normalize_for(config, images[rows]))).reshape(BATCH, -1))
    return np.concatenate(parts)[: len(images)]


@functools.cache
def _efficientnet(side: int) -> tuple[EfficientNetLiteConfig, Callable[[Any], Any]]:
    config = EfficientNetLiteConfig(image_size=side, taps=TAPS)
    graphdef, shapes, _ = abstract(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    params = read_weights(shapes)
    run = jax.jit(lambda params, images: merge(graphdef, params)(images))
    return config, functools.partial(run, params)
