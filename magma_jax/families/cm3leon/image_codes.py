"""Codes of images in memory, in place of their placeholders in a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from magma_jax.data.documents.places import image_places
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.models.vision.vqgan import TOKENIZER, VQGAN, VQGANConfig, from_pixels
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.runtime.distributed import is_main
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch, replicated
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Int, Params, UInt8

Batch = dict[str, np.ndarray]

# Images at a time, at least.
ROWS = 32


def code_loader(program: Any, dataset: Any, params: Mapping[str, Any]) -> Callable[[Batch], Batch]:
    """Builds the function that completes a batch: codes for placeholders in its ids, and places of the grid.

    Images in memory are encoded here, once. Data without images already hold codes.
    """
    config: CM3LeonConfig = program.config.model
    to_codes = _fill(program, dataset, params, config)
    if not config.grid_positions:
        return to_codes

    def complete(batch: Batch) -> Batch:
        filled = to_codes(batch)
        if "places" in filled:  # of documents with images beside the sequence
            return filled
        return filled | {"places": np.stack([image_places(row, config.vocabulary) for row in filled["tokens"]])}

    return complete


def _fill(program: Any, dataset: Any, params: Mapping[str, Any], config: CM3LeonConfig) -> Callable[[Batch], Batch]:
    if dataset.images is None or config.tokenizer is None:
        return lambda batch: batch
    flat = _encode_all(dataset.images, config.tokenizer, tokenizer_params(params), program.mesh).ravel()
    start = config.vocabulary.image_ids.start

    def filled(tokens: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        places = tokens - start
        return np.where(places < 0, tokens, start + flat[np.maximum(places, 0)]).astype(tokens.dtype)

    names = ("tokens", "labels", "references")
    return lambda batch: batch | {name: filled(batch[name]) for name in names if name in batch}


def tokenizer_params(params: Mapping[str, Any]) -> Params:
    """The parameters of a model's image tokenizer, as those of the tokenizer alone."""
    below = f"{TOKENIZER}/"
    return {
        path.removeprefix(below): leaf if isinstance(leaf, jax.Array) else jnp.asarray(read_array(leaf))
        for path, leaf in params.items()
        if path.startswith(below)
    }


def _encode_all(
    images: UInt8[np.ndarray, "N H W 3"], config: VQGANConfig, params: Params, mesh: Mesh
) -> Int[np.ndarray, "N T"]:
    """Codes of all images, row by row, with a progress bar; the devices and processes of the mesh share the work."""
    definition = abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[0]
    size = -(-ROWS // batch_shards(mesh)) * batch_shards(mesh)
    rows, parts = local_rows(mesh, size), []
    quiet = None if is_main() else True
    for start in tqdm(range(0, len(images), size), desc="encoding images", unit="batch", disable=quiet):
        # The last batch is padded with its last image, so that one program serves all batches.
        chosen = np.minimum(np.arange(start, start + size), len(images) - 1)
        placed = place_batch({"images": images[chosen[rows]]}, mesh, size)["images"]
        parts.append(np.asarray(_encode(definition, params, placed, out=replicated(mesh))))
    return np.concatenate(parts)[: len(images)].reshape(len(images), -1)


@functools.partial(jax.jit, static_argnames=("definition", "out"))
def _encode(definition: Definition, params: Params, images: Any, *, out: Any) -> Any:
    return jax.lax.with_sharding_constraint(merge(definition, params).encode(from_pixels(images)), out)
