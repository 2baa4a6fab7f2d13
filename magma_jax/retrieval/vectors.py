"""Vectors of texts and images."""

import numpy as np

from magma_jax.typing import Float


def unit(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Vectors of norm 1; those of norm 0 stay."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
