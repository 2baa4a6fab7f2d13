"""Image inputs of the loss from the image rows of a batch: pixels, or cached features."""

from collections.abc import Callable

import jax
import numpy as np

from magma_jax.data.batches.folders import fill_images
from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.inference.image_features import ENCODER, encode_all
from magma_jax.nn.modules import Definition
from magma_jax.training.run.program import Program
from magma_jax.training.step.optim import STATISTIC, learns
from magma_jax.typing import Params, UInt8

Batch = dict[str, np.ndarray]

# Limit of cached features of stored images, in host memory.
KEPT_FEATURE_BYTES = 2 * 2**30


def image_loader(
    images: UInt8[np.ndarray, "N H W 3"] | StoredImages | None, program: Program, params: Params
) -> Callable[[Batch], Batch]:
    """Builds the function that replaces ``image_rows`` in a batch by ``features`` or ``images`` (uint8).

    If every parameter of the encoder is frozen and its BatchNorms keep their statistics, its features never change.
    Features of images in memory are then computed here, once; those of stored images at first use, and cached while
    there is room.
    """
    if images is None:
        return lambda batch: batch
    if isinstance(images, StoredImages):
        # One process only: the features of another process's rows are not computed here.
        keep = features_are_fixed(program) and images.are_fixed and jax.process_count() == 1
        features_of = KeptFeatures(program, params) if keep else _without

        def prepare(batch: Batch) -> Batch:
            # Training batches already hold their images.
            return features_of(batch if "images" in batch else fill_images(batch, images)[0])

        return prepare
    if not features_are_fixed(program):
        return lambda batch: _without(batch) | {"images": images[batch["image_rows"]]}
    features = encode_all(images, program.graphdef, params, program.mesh)
    return lambda batch: _without(batch) | {"features": features[batch["image_rows"]]}


class KeptFeatures:
    """Replaces ``image_rows`` and ``images`` in a batch by ``features``, which are computed once per image.

    Once ``nbytes`` are used, batches with further images keep their images.
    """

    def __init__(self, program: Program, params: Params, nbytes: int = KEPT_FEATURE_BYTES):
        self._program, self._nbytes = program, nbytes
        # Copied, because statistics are part of the state, which each step donates.
        self._params = {
            path: leaf.copy() if path.startswith(ENCODER) and program.labels[path] == STATISTIC else leaf
            for path, leaf in params.items()
        }
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, batch: Batch) -> Batch:
        rows = batch["image_rows"].ravel()
        images = batch["images"].reshape(-1, *batch["images"].shape[-3:])
        wanted = {int(row): place for place, row in enumerate(rows) if int(row) not in self._kept}
        if wanted and sum(kept.nbytes for kept in self._kept.values()) < self._nbytes:
            new = encode_all(
                images[list(wanted.values())],
                self._program.graphdef,
                self._params,
                self._program.mesh,
                len(rows),
                progress=False,
            )
            self._kept |= dict(zip(wanted, new, strict=True))
        elif wanted:
            return _without(batch)
        features = np.stack([self._kept[int(row)] for row in rows])
        rest = {name: array for name, array in _without(batch).items() if name != "images"}
        return rest | {"features": features.reshape(*batch["image_rows"].shape, *features.shape[1:])}


def features_are_fixed(program: Program) -> bool:
    """Whether the features of an image stay the same throughout training."""
    encoder = [label for path, label in program.labels.items() if path.startswith(ENCODER)]
    updates = program.config.loss.batch_norm == "batch" and STATISTIC in encoder
    return not updates and not any(map(learns, encoder))


def feature_statistics(
    images: UInt8[np.ndarray, "N H W 3"] | StoredImages, graphdef: Definition, params: Params, count: int = 512
) -> Params:
    """Mean and standard deviation per channel of the features of ``count`` evenly spaced images.

    Empty unless the prefix standardizes its features.
    """
    if "image_prefix/feature_mean" not in params:
        return {}
    chosen = np.unique(np.linspace(0, len(images) - 1, count).astype(int))
    features = encode_all(images[chosen], graphdef, params)
    axes = tuple(range(features.ndim - 1))
    # The floor keeps constant channels from being blown up.
    std = np.maximum(features.std(axes), 1e-3)
    return {"image_prefix/feature_mean": features.mean(axes), "image_prefix/feature_std": std}


def _without(batch: Batch) -> Batch:
    return {name: array for name, array in batch.items() if name != "image_rows"}
