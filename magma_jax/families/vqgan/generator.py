"""The interface for users: images to codes and back.

tokenizer = open_generator("runs/vqgan_quickstart")
codes = tokenizer.encode(images)
images = tokenizer.decode(codes)
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from magma_jax.families.vqgan.loading import load_image_tokenizer
from magma_jax.inference.answers import Answer, AnswerOptions
from magma_jax.inference.buckets import Buckets
from magma_jax.inference.generator import Makes
from magma_jax.inference.prompts import Prompt
from magma_jax.models.vision.vqgan import VQGAN, VQGANConfig, from_pixels, to_pixels
from magma_jax.nn.modules import Definition, abstract, merge
from magma_jax.runtime.compile import platform_jit, trim_after_compile
from magma_jax.typing import Array, Int, Params, UInt8

# Images of a compiled program; more are run in parts.
BATCHES = Buckets((1, 4, 16, 64))


class ImageTokenizer:
    """A VQ-GAN with its weights.

    Attributes:
        makes: nothing that a prompt asks for.
        config: its sizes.
        params: its weights, by path.
        image_size: nominal side of the images.
        size: number of codes.
        tokens: codes of an image of the nominal size.
    """

    makes: frozenset[Makes] = frozenset()

    def __init__(self, config: VQGANConfig, params: Params):
        trim_after_compile()
        self.config, self.params = config, params
        self.image_size, self.size, self.tokens = config.image_size, config.codes, config.tokens
        self._graphdef = abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))[0]

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        ema: bool | None = None,
    ) -> "ImageTokenizer":
        """Loads a run folder, a model folder or a file in a published layout; arguments as for ``Family.open``."""
        return cls(*load_image_tokenizer(path, dtype, mesh, ema))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of sizes and weights."""
        found = hashlib.sha256(repr(self.config).encode())
        for path in sorted(self.params):
            found.update(path.encode() + np.asarray(self.params[path]).tobytes())
        return found.hexdigest()

    def answers(
        self, prompts: Iterable[Prompt], options: AnswerOptions = AnswerOptions(), *, count: int | None = None
    ) -> Iterator[list[Answer]]:
        """Raises ValueError: an image tokenizer answers no prompts."""
        raise ValueError("an image tokenizer answers no prompts; call its encode and decode")

    def encode(self, images: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N L"]:
        """Codes of images, row by row from the top left; L = H W / factor^2, int32.

        Raises:
            ValueError: not such images, or a side that is not a multiple of the config's ``factor``.
        """
        images, factor = np.asarray(images), self.config.factor
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: both sides must be multiples of {factor}"
            )
        codes = _in_parts(lambda part: _encode(self._graphdef, self.params, part), images)
        return codes.reshape(len(images), images.shape[1] * images.shape[2] // factor**2)

    def decode(self, codes: Int[np.ndarray, "N L"], height: int | None = None) -> UInt8[np.ndarray, "N H W 3"]:
        """Images of codes; ``height`` in pixels, by default that of a square.

        Raises:
            ValueError: codes out of range, or a number of codes that does not fill rows of this height.
        """
        codes, factor = np.asarray(codes), self.config.factor
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes must be whole numbers (N, L), got {codes.dtype} {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.config.codes:
            raise ValueError(
                f"codes are 0 to {self.config.codes - 1} for this tokenizer, got {codes.min()} to {codes.max()}"
            )
        rows = round(codes.shape[1] ** 0.5) if height is None else height // factor
        if rows < 1 or codes.shape[1] % rows or (height is None and rows**2 != codes.shape[1]):
            shape = "a square" if height is None else f"a height of {height} pixels"
            raise ValueError(f"{codes.shape[1]} codes of {factor} x {factor} pixels do not fill {shape}")
        grids = codes.astype(np.int32).reshape(len(codes), rows, -1)
        return _in_parts(lambda part: _decode(self._graphdef, self.params, part), grids)


def _in_parts(function: Callable[[np.ndarray], Array], inputs: np.ndarray) -> np.ndarray:
    """Runs a batch in parts of the sizes of ``BATCHES``, each padded with its last row."""
    if not len(inputs):
        return np.asarray(function(np.zeros((1, *inputs.shape[1:]), inputs.dtype)))[:0]
    size = min(BATCHES.fit(len(inputs)), BATCHES.sizes[-1])
    parts = []
    for start in range(0, len(inputs), size):
        part = inputs[np.minimum(np.arange(start, start + size), len(inputs) - 1)]
        parts.append(np.asarray(function(part)))
    return np.concatenate(parts)[: len(inputs)]


@platform_jit(static_argnames=("graphdef",))
def _encode(graphdef: Definition, params: Params, pixels: Array) -> Array:
    return merge(graphdef, params).encode(from_pixels(pixels).astype(params["codebook/weight"].dtype))


@platform_jit(static_argnames=("graphdef",))
def _decode(graphdef: Definition, params: Params, codes: Array) -> Array:
    return to_pixels(merge(graphdef, params).decode(codes))
