"""A prefix that starts near the embeddings of the captions' tokens."""

import dataclasses
import sys

import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.families.magma.word_start import both_ends, equal_parts, ridge, word_start
from magma_jax.models.prefix import PrefixConfig
from magma_jax.models.vision.efficientnet_lite import EfficientNetLiteConfig
from tests import tiny

MODULE = "magma_jax.families.magma.word_start"
DATA = tiny.dataset()
PREFIX = PrefixConfig(image_positions=9, standardize=True, start="words", scale=0.5)
POOLED = dataclasses.replace(
    tiny.MODEL, encoder=dataclasses.replace(tiny.MODEL.encoder, output="pooled"), prefix=PREFIX
)


def test_ridge_regression():
    rng = np.random.default_rng(0)
    inputs, weight, bias = rng.normal(size=(6, 20)), rng.normal(size=(3, 20)), rng.normal(size=3)
    outputs = inputs @ weight.T + bias
    found, offset = ridge(inputs, outputs, 1e-9)
    np.testing.assert_allclose(inputs @ found.T + offset, outputs, atol=1e-5)
    # The usual form, in as many unknowns as features.
    centred = inputs - inputs.mean(0)
    squares = centred.T @ centred
    penalty = 0.5 * np.trace(squares) / 6
    usual = np.linalg.solve(squares + penalty * np.eye(20), centred.T @ (outputs - outputs.mean(0))).T
    np.testing.assert_allclose(ridge(inputs, outputs, 0.5)[0], usual, atol=1e-10)


def test_vectors_start_near_the_words_of_a_caption(monkeypatch):
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (len(DATA.images), 16)).astype(np.float32)
    monkeypatch.setattr(sys.modules[MODULE], "encode_all", lambda images, graphdef, params: features)
    monkeypatch.setattr(sys.modules[MODULE], "RIDGE", 1e-6)
    table = rng.normal(size=(300, 32)).astype(np.float32)
    found = word_start(POOLED, DATA, None, {"lm/wte/weight": table})
    scaled = (features - found["image_prefix/feature_mean"]) / found["image_prefix/feature_std"]
    vectors = scaled @ found["image_prefix/proj/weight"].T + found["image_prefix/proj/bias"]
    captions = [sample.answer for sample in DATA.evaluation["train"] if sample.kind == "caption"]
    for caption, made in zip(captions, vectors.reshape(4, 9, 32), strict=True):
        tokens = DATA.tokenizer.encode(caption)
        np.testing.assert_allclose(made, table[both_ends(tokens, 9)], atol=1e-3)


def test_vectors_are_of_both_ends_of_a_caption():
    assert both_ends(list(range(9)), 5) == [0, 1, 2, 7, 8]
    assert both_ends([1, 2, 3], 8) == [1, 2, 3, 1, 1, 2, 3, 1]
    assert both_ends([1, 2, 3], 1) == [1]


def test_a_layer_of_few_features_counts_like_one_of_many():
    encoder = EfficientNetLiteConfig(image_size=32, taps=("head",), statistics=("stem",), joined=True)
    assert encoder.parts == (1280, 64)
    features = np.random.default_rng(0).normal(size=(50, encoder.channels))
    many, few = np.split((features * equal_parts(features, encoder.parts)).var(0), [1280])
    np.testing.assert_allclose([many.sum(), few.sum()], 1)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (dataclasses.replace(POOLED, encoder=tiny.MODEL.encoder), DATA, "an encoder that gives one vector an image"),
        (dataclasses.replace(POOLED, prefix=dataclasses.replace(PREFIX, mapping="mlp")), DATA, "needs mapping linear"),
        (POOLED, dataclasses.replace(DATA, evaluation={}), "needs captions of images in memory"),
        (POOLED, dataclasses.replace(DATA, images=None), "needs captions of images in memory"),
    ],
)
def test_what_cannot_start_as_words_is_said(config, data, message):
    with pytest.raises(ConfigError, match=message):
        word_start(config, data, None, {})
