"""From the picture rows of a batch to what the loss wants: normalised pictures, or features computed once."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from magma_jax.data.images import normalize
from magma_jax.models.encoders import ENCODERS
from magma_jax.nn.modules import Params, merge
from magma_jax.training.program import Program
from magma_jax.typing import Array, Float, UInt8

Batch = dict[str, np.ndarray]


def picture_loader(
    images: UInt8[np.ndarray, "N H W 3"] | None, program: Program, params: Params
) -> Callable[[Batch], Batch]:
    """Builds the function that replaces ``pictures`` in a batch by ``features`` or ``images``.

    If every parameter of the encoder is frozen and its BatchNorms keep their statistics, its features never change
    and are computed here, once for all pictures.
    """
    if images is None:
        return lambda batch: batch
    entry = ENCODERS[program.config.model.encoder.kind]
    if not features_are_fixed(program):
        return lambda batch: _without(batch) | {"images": normalize(images[batch["pictures"]], entry.mean, entry.std)}
    features = encode_all(images, program.graphdef, params)
    return lambda batch: _without(batch) | {"features": features[batch["pictures"]]}


def features_are_fixed(program: Program) -> bool:
    """Whether training changes nothing that the features of a picture depend on."""
    encoder = [label for path, label in program.labels.items() if path.startswith("image_prefix/encoder/")]
    updates = program.config.loss.batch_norm == "batch" and "statistic" in encoder
    return not updates and not any(label in ("encoder", "rest") for label in encoder)


def feature_statistics(
    images: UInt8[np.ndarray, "N H W 3"], graphdef: nnx.GraphDef, params: Params, pictures: int = 512
) -> Params:
    """Mean and standard deviation per channel of the features of ``pictures`` pictures, evenly spaced.

    For a prefix that standardizes its features; empty for others.
    """
    if "image_prefix/feature_mean" not in params:
        return {}
    chosen = np.unique(np.linspace(0, len(images) - 1, pictures).astype(int))
    features = encode_all(images[chosen], graphdef, params)
    axes = tuple(range(features.ndim - 1))
    # A channel that never varies is left at its own scale.
    std = np.maximum(features.std(axes), 1e-3)
    return {"image_prefix/feature_mean": features.mean(axes), "image_prefix/feature_std": std}


def encode_all(
    images: UInt8[np.ndarray, "N H W 3"],
    graphdef: nnx.GraphDef,
    params: Params,
    batch_size: int = 64,
    *,
    progress: bool = True,
) -> Float[np.ndarray, "N ..."]:
    """Features of every picture, with a progress bar on terminals."""
    entry = ENCODERS[merge(graphdef, params).config.encoder.kind]
    starts = range(0, len(images), batch_size)
    parts = []
    for start in tqdm(starts, desc="encoding pictures", unit="batch", disable=None if progress else True):
        pixels = images[start : start + batch_size]
        # The last batch is filled up, so that one program serves all.
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - len(pixels), axis=0)])
        features = _encode(graphdef, params, normalize(padded, entry.mean, entry.std))
        parts.append(np.asarray(features)[: len(pixels)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _encode(graphdef: nnx.GraphDef, params: Params, images: Float[Array, "B H W 3"]) -> Float[Array, "B ..."]:
    return merge(graphdef, params).encode_images(images)


def _without(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if name != "pictures"}
