"""Codes of images in memory, in place of their placeholders in a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from magma_jax.inference.image_codes import ImageCodes
from magma_jax.models.cm3leon import CM3LeonConfig
from magma_jax.typing import Int

Batch = dict[str, np.ndarray]


def code_loader(program: Any, dataset: Any, params: Mapping[str, Any]) -> Callable[[Batch], Batch]:
    """Builds the function that replaces placeholders in ``tokens`` and ``labels`` by codes.

    Images in memory are encoded here, once. Data without images already hold codes.
    """
    config: CM3LeonConfig = program.config.model
    if dataset.images is None or config.tokenizer is None:
        return lambda batch: batch
    codes = ImageCodes(config.tokenizer, params, mesh=program.mesh).encode(dataset.images, progress=True)
    start, flat = config.vocabulary.image_ids.start, codes.ravel()

    def filled(tokens: Int[np.ndarray, "B S"]) -> Int[np.ndarray, "B S"]:
        places = tokens - start
        return np.where(places < 0, tokens, start + flat[np.maximum(places, 0)]).astype(tokens.dtype)

    return lambda batch: batch | {name: filled(batch[name]) for name in ("tokens", "labels")}
