"""A tiny language model with the weights and ids that the golden logits of PEFT's writer were computed with."""

import numpy as np
from flax import nnx

from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import abstract
from tests.models.language_tiny import LANGUAGE_MODELS

CONFIG = LANGUAGE_MODELS["llama"]
IDS = np.random.default_rng(1).integers(0, 97, (2, 9))


def base() -> dict[str, np.ndarray]:
    """Parameters, large enough for attention to choose."""
    random = np.random.default_rng(0)
    shapes = abstract(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]
    return {
        path: (random.normal(size=shape.shape) * 0.3 + ("ln" in path)).astype(np.float32)
        for path, shape in sorted(shapes.items())
    }
