"""Codes of images, and images of codes, by an image tokenizer in batches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from magma_jax.inference.image_features import Images
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig, to_pixels
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.runtime.distributed import is_main
from magma_jax.runtime.sharding import batch_shards, local_rows, place_batch, replicated
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Array, Int, Params, UInt8


class ImageCodes:
    """A frozen image tokenizer.

    Args:
        config: config of the tokenizer.
        params: parameters of a model.
        prefix: path prefix of the tokenizer's among them.
        mesh: devices to share the work among, if the parameters are on them.
        batch_size: images at a time.
    """

    def __init__(
        self,
        config: VQGANConfig,
        params: Mapping[str, Any],
        prefix: str = "image_tokenizer/",
        *,
        mesh: Mesh | None = None,
        batch_size: int = 32,
    ):
        self.config, self._mesh = config, mesh
        self._graphdef = tokenizer_graphdef(config)
        self._params: Params = {
            path.removeprefix(prefix): leaf if isinstance(leaf, jax.Array) else jnp.asarray(read_array(leaf))
            for path, leaf in params.items()
            if path.startswith(prefix)
        }
        self._size = batch_size if mesh is None else -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)

    def encode(
        self, images: UInt8[np.ndarray, "N H W 3"] | Images, *, progress: bool = False
    ) -> Int[np.ndarray, "N T"]:
        """Codes of images at the config's size, row by row."""
        rows = list(range(self._size)) if self._mesh is None else local_rows(self._mesh, self._size)
        out = None if self._mesh is None else replicated(self._mesh)
        quiet = None if progress and is_main() else True
        parts = []
        for start in tqdm(range(0, len(images), self._size), desc="encoding images", unit="batch", disable=quiet):
            # The last batch is padded with its last image, so that one program serves all batches.
            chosen = np.minimum(np.arange(start, start + self._size), len(images) - 1)
            pixels: dict[str, Any] = {"images": np.asarray(images[chosen[rows]])}
            if self._mesh is not None:
                pixels = place_batch(pixels, self._mesh, self._size)
            parts.append(np.asarray(_encode(self._graphdef, self._params, pixels["images"], out=out)))
        if not parts:
            return np.zeros((0, self.config.tokens), np.int32)
        return np.concatenate(parts)[: len(images)]

    def decode(self, codes: Int[np.ndarray, "N T"]) -> UInt8[np.ndarray, "N H W 3"]:
        """Images of codes, row by row."""
        side = self.config.image_size // self.config.factor
        parts = []
        for start in range(0, len(codes), self._size):
            chosen = np.minimum(np.arange(start, start + min(self._size, len(codes))), len(codes) - 1)
            grids = jnp.asarray(codes[chosen]).reshape(-1, side, side)
            parts.append(np.asarray(_decode(self._graphdef, self._params, grids)))
        size = self.config.image_size
        return np.concatenate(parts)[: len(codes)] if parts else np.zeros((0, size, size, 3), np.uint8)


@functools.cache
def tokenizer_graphdef(config: VQGANConfig) -> Definition:
    """The structure of an image tokenizer."""
    return abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[0]


@functools.partial(jax.jit, static_argnames=("graphdef", "out"))
def _encode(graphdef: Definition, params: Params, images: Array, *, out: Any) -> Array:
    codes = merge(graphdef, params).encode(images.astype(jnp.float32) / 127.5 - 1)
    codes = codes.reshape(codes.shape[0], -1).astype(jnp.int32)
    return codes if out is None else jax.lax.with_sharding_constraint(codes, out)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _decode(graphdef: Definition, params: Params, codes: Array) -> Array:
    return to_pixels(merge(graphdef, params).decode(codes))
