"""A prefix that starts as words: regressed on the embeddings of the captions' own tokens.

A frozen language model knows what to do with the vectors of "a lion"; a random prefix has to find them through all of
its layers, which costs a pass forward and back a step. Ridge regression from the image features to the embeddings of a
caption's tokens finds them at once: the first half of an image's vectors start near the first tokens of its caption,
the second half near the last ones, so that words at the end, such as colours, have the same vector in captions of any
length. The LayerNorm behind it gives the vectors their length. Only images with captions are used; training goes on
from there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from magma_jax.config import ConfigError
from magma_jax.data.batches.stored_images import StoredImages
from magma_jax.evaluation.results.results import CAPTION
from magma_jax.inference.image_features import encode_all
from magma_jax.models.magma import MagmaConfig
from magma_jax.storage.deferred import read_array
from magma_jax.typing import Float, Params

# The penalty, as a share of the mean squared length of an image's features.
RIDGE = 1e-3


def word_start(config: MagmaConfig, dataset: Any, graphdef: Any, params: Params) -> Params:
    """Starting values of the prefix's map, and of its features' mean and standard deviation if it has them.

    Raises:
        ConfigError: a prefix that is not one linear map of a pooled vector, or data without captions in memory.
    """
    if config.prefix.mapping != "linear" or config.encoder.positions is not None:
        raise ConfigError("model.prefix.start words needs mapping linear and an encoder that gives one vector an image")
    captions = [sample for sample in dataset.evaluation.get("train", ()) if sample.kind == CAPTION]
    if not captions or dataset.images is None or isinstance(dataset.images, StoredImages):
        raise ConfigError("model.prefix.start words needs captions of images in memory, such as data.kind openmoji has")
    features = encode_all(dataset.images[np.array([sample.image for sample in captions])], graphdef, params)
    found: Params = {}
    if config.prefix.standardize:
        mean, std = features.mean(0), np.maximum(features.std(0), 1e-3)
        features = (features - mean) / std
        found = {"image_prefix/feature_mean": mean, "image_prefix/feature_std": std}
    count = config.prefix.image_positions
    tokens = np.array([both_ends(dataset.tokenizer.encode(sample.answer), count) for sample in captions])
    embeddings = read_array(params["lm/wte/weight"]).astype(np.float32)[tokens].reshape(len(captions), -1)
    scale = equal_parts(features, getattr(config.encoder, "parts", features.shape[1:]))
    weight, bias = ridge(features * scale, embeddings, RIDGE)
    return found | {"image_prefix/proj/weight": weight * scale, "image_prefix/proj/bias": bias}


def ridge(
    inputs: Float[np.ndarray, "N C"], outputs: Float[np.ndarray, "N D"], penalty: float
) -> tuple[Float[np.ndarray, "D C"], Float[np.ndarray, " D"]]:
    """Weight (out, in) and bias of a ridge regression; ``penalty`` times the inputs' mean squared length is added."""
    centre, mean = inputs.mean(0), outputs.mean(0)
    inputs, outputs = inputs - centre, outputs - mean
    # As many unknowns as samples: features are more.
    products = inputs @ inputs.T
    products[np.diag_indices_from(products)] += penalty * np.trace(products) / len(products)
    weight = np.linalg.solve(products, outputs).T @ inputs
    return weight, mean - weight @ centre


def equal_parts(features: Float[np.ndarray, "N C"], sizes: Sequence[int]) -> Float[np.ndarray, " C"]:
    """Factors that give the parts of a feature vector the same variance in total.

    Otherwise the thousands of features of one layer hide the few of another from the penalty.
    """
    parts = np.split(features.var(0), np.cumsum(sizes)[:-1])
    return np.concatenate([np.full(len(part), 1 / np.sqrt(max(part.sum(), 1e-12))) for part in parts])


def both_ends(tokens: list[int], count: int) -> list[int]:
    """The first and the last tokens, half of ``count`` each; fewer tokens are repeated."""
    repeated, last = (tokens * count)[:count], count // 2
    return repeated[: count - last] + (tokens[-last:] if 0 < last <= len(tokens) else repeated[:last])
