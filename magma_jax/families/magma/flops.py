"""Operations of a MAGMA training step, see ``training.step.flops``.

The encoder costs three forward passes if it learns, one if it is frozen, none if the batch holds its features.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from magma_jax.inference.image_features import ENCODER
from magma_jax.models.magma import MagmaConfig
from magma_jax.models.vision.catalog import EncoderConfig, build_encoder
from magma_jax.nn.modules import abstract, merge
from magma_jax.training.step.flops import (
    LANGUAGE_INPUTS,
    StepFlops,
    attention_flops,
    learning_paths,
    matmul_flops,
    matrix_flops,
)

# Vectors per row that a path's weights multiply. Encoders are counted by tracing instead.
INPUTS = (
    (re.compile(r"image_prefix/encoder/.*|image_prefix/(.*/)?ln(_\w+)?/weight"), None),
    (re.compile(r"image_prefix/queries"), None),
    (re.compile(r"image_prefix/transformer/.*weight|image_prefix/resampler/(?!kv_).*weight"), "image"),
    (re.compile(r"image_prefix/resampler/kv_proj/weight"), "read"),
    (re.compile(r"image_prefix/proj(_in)?/weight"), "features"),
    (re.compile(r"class_head/weight"), "row"),
    *LANGUAGE_INPUTS,
)


def step_flops(
    config: MagmaConfig,
    shapes: Mapping[str, Any],
    labels: Mapping[str, str],
    batch: Mapping[str, tuple[int, ...]],
    options: Any = None,
) -> StepFlops:
    """Counts the operations of one optimizer step; ``batch`` has the shapes of the whole batch.

    Raises:
        ValueError: a matrix that no rule matches.
    """
    rows, length = batch["tokens"]
    packed, cached = "segments" in batch, "features" in batch
    pack = batch["features" if cached else "images"][1] if packed else 1
    grid = config.encoder.positions
    image, features = config.prefix.positions(grid), config.prefix.joined(grid) or 1
    vectors = {
        # The last token predicts nothing; in unpacked rows it is not run.
        "positions": pack * (image + (config.begin is not None)) + length - (0 if packed else 1),
        "predicted": length,  # the image's last position predicts the first token
        "image": pack * image,
        "features": pack * features,
        "read": pack * (features + image),
        "row": 1,
    }
    encoder_learns = any(path.startswith(ENCODER) for path in learning_paths(labels))
    # Only a trained encoder needs a gradient with respect to the features.
    frozen, trained = matrix_flops(shapes, labels, INPUTS, vectors, first=() if encoder_learns else ("features",))
    attention = attention_flops(config.lm.trunk().block.query_width, config.lm.layers, vectors["positions"])
    if config.prefix.mapping == "transformer":
        attention += pack * attention_flops(config.lm.width, config.prefix.transformer_layers, image)
    elif config.prefix.mapping == "resampler":
        scores = attention_flops(config.lm.width, config.prefix.transformer_layers, 1)
        attention += pack * scores * image * (features + image)
    encoder = 0 if cached else (3 if encoder_learns else 1) * pack * encoder_flops(config.encoder)
    return StepFlops(*(rows * count for count in (frozen, trained, attention, encoder)))


@functools.lru_cache
def encoder_flops(config: EncoderConfig) -> int:
    """Operations of the matmuls and convolutions that an encoder runs for one image, forward."""
    graphdef, shapes, _ = abstract(lambda: build_encoder(config, rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda params, images: merge(graphdef, params)(images, batch_norm="frozen"))
    return matmul_flops(traced(shapes, image).jaxpr)
