"""A start that data decides: the codebook is a k-means clustering of the encoder's first outputs."""

import functools
from typing import Any

import jax
import numpy as np

from magma_jax.data.batches.folders import fill_images
from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.models.vision.codebook import kmeans
from magma_jax.models.vision.vqgan import from_pixels
from magma_jax.nn.modules import Definition, merge
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Array, Params

# Vectors per code; images to take them from, at least; images per call of the encoder.
VECTORS, IMAGES, BATCH = 64, 2048, 16
# Power of a vector's count that it is drawn in proportion to. For drawings 0.75 keeps more tones than 0, 0.5 and 1.
POWER = 0.75


def first_codebook(program: Any, dataset: Any, params: Params) -> Params:
    """The codebook before the first step; ``program``, ``dataset`` and ``params`` as of ``Family.first_values``.

    Clusters outputs for evenly spaced training images, equal ones less often than they occur: those of an empty
    background would take many codes.
    """
    if dataset.images is None:
        return {}
    config = program.config.model
    rows = np.arange(len(dataset.images)) if dataset.learned is None else np.asarray(dataset.learned)
    count = min(len(rows), max(IMAGES, -(-VECTORS * config.codes // config.tokens)))
    chosen = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    arrays = {path: leaf if isinstance(leaf, jax.Array) else read_array(leaf) for path, leaf in params.items()}
    parts = []
    for start in range(0, count, BATCH):
        part = chosen[np.minimum(np.arange(start, start + BATCH), count - 1)]
        parts.append(np.asarray(_latents(program.graphdef, arrays, dataset.images[part]))[: count - start])
    vectors, counts = np.unique(np.concatenate(parts).reshape(-1, config.code_width), axis=0, return_counts=True)
    rng, chances = np.random.default_rng(program.config.seed), counts**POWER
    vectors = vectors[rng.choice(len(vectors), VECTORS * config.codes, p=chances / chances.sum())]
    return {"codebook/weight": np.asarray(_kmeans(jax.random.key(program.config.seed), vectors, config.codes))}


def image_batch(dataset: Any) -> Any:
    """A function that keeps of a dataset's batch only its images; an unusable one is black."""
    images = dataset.images

    def prepare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counted = {name: batch[name] for name in dataset.counted if name in batch}
        if "images" not in batch:
            stored = isinstance(images, StoredImages)
            batch = fill_images(batch, images)[0] if stored else {"images": images[batch["image_rows"]]}
        return counted | {"images": batch["images"]}

    return prepare


_kmeans = jax.jit(kmeans, static_argnums=2)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _latents(graphdef: Definition, params: Params, images: Array) -> Array:
    return merge(graphdef, params).latents(from_pixels(images))
