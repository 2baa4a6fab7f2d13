"""CLIP as an encoder of documents, the paper's: both towers of a file of OpenAI's or open_clip's."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from magma_jax.data.tokenizers.clip_text import clip_tokens
from magma_jax.models.clip import CLIP
from magma_jax.models.vision.catalog import normalize_for
from magma_jax.nn.modules import abstract, merge
from magma_jax.published.text.open_clip import open_clip
from magma_jax.storage.hub import local_path
from magma_jax.typing import Float, Params, UInt8

# Texts or images of a compiled program.
BATCH = 32


class ClipEncoder:
    """The encoder; see ``encoders.Encoder``. Its name has the activation and the begin of a hash of the projections.

    Args:
        path: the file; errors as of ``published.text.open_clip``.
    """

    def __init__(self, path: str | Path):
        with open_clip(local_path(path)) as (config, tensors):
            self._config = config
            self._params = {name: jnp.asarray(tensor.read(), jnp.float32) for name, tensor in tensors.items()}
        self._definition = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))[0]
        self.width, self.image_size = config.image.embedding_width, config.image.image_size
        digest = hashlib.sha256(np.asarray(self._params["text/proj"]).tobytes()).hexdigest()[:8]
        self.name = f"{config.image.kind}-{config.text.activation}-{digest}"

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Vectors of texts; a text of too many tokens is cut."""
        run = functools.partial(_texts, self._definition, self._params)
        return self._in_parts(run, clip_tokens(texts, self._config.text.positions))

    def images(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N D"]:
        run = functools.partial(_images, self._definition, self._params)
        return self._in_parts(lambda part: run(normalize_for(self._config.image, part)), images)

    def _in_parts(self, run: Callable[[np.ndarray], Any], rows: np.ndarray) -> Float[np.ndarray, "N D"]:
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(rows), BATCH):
            # The last batch repeats its last row, so that one program serves all.
            parts.append(np.asarray(run(rows[np.minimum(np.arange(start, start + BATCH), len(rows) - 1)])))
        return np.concatenate(parts)[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _texts(definition: Any, params: Params, tokens: Any) -> Any:
    return merge(definition, params).embed_texts(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _images(definition: Any, params: Params, images: Any) -> Any:
    return merge(definition, params).embed_images(images)
