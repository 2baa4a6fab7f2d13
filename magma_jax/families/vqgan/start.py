"""A start that data decides: the codebook is a k-means clustering of the encoder's first outputs."""

import functools
from typing import Any

import jax
import numpy as np

from magma_jax.models.vision.codebook import kmeans
from magma_jax.models.vision.vqgan import from_pixels
from magma_jax.nn.modules import Definition, merge
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Array, Params

# Vectors per code, and images per call of the encoder.
VECTORS, BATCH = 32, 16


def first_codebook(program: Any, dataset: Any, params: Params) -> Params:
    """The codebook before the first step; ``program``, ``dataset`` and ``params`` as of ``Family.first_values``.

    Clusters the outputs for evenly spaced training images, as many as give ``VECTORS`` vectors per code.
    """
    if dataset.images is None:
        return {}
    config = program.config.model
    rows = np.arange(len(dataset.images)) if dataset.learned is None else np.asarray(dataset.learned)
    count = min(len(rows), -(-VECTORS * config.codes // config.tokens))
    chosen = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    arrays = {path: leaf if isinstance(leaf, jax.Array) else read_array(leaf) for path, leaf in params.items()}
    parts = []
    for start in range(0, count, BATCH):
        part = chosen[np.minimum(np.arange(start, start + BATCH), count - 1)]
        parts.append(np.asarray(_latents(program.graphdef, arrays, dataset.images[part]))[: count - start])
    vectors = np.concatenate(parts).reshape(-1, config.code_width)
    if len(vectors) < config.codes:
        # A code for every vector there is; the others start as copies and part when they restart.
        vectors = np.resize(vectors, (config.codes, config.code_width))
    return {"codebook/weight": np.asarray(_kmeans(jax.random.key(program.config.seed), vectors, config.codes))}


def image_batch(dataset: Any) -> Any:
    """A function that keeps of a dataset's batch its images, taken from memory if they are there."""
    images = dataset.images

    def prepare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counted = {name: batch[name] for name in dataset.counted if name in batch}
        return counted | {"images": batch["images"] if "images" in batch else images[batch["image_rows"]]}

    return prepare


_kmeans = jax.jit(kmeans, static_argnums=2)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _latents(graphdef: Definition, params: Params, images: Array) -> Array:
    return merge(graphdef, params).latents(from_pixels(images))
