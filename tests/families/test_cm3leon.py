"""The loss of CM3Leon: all labels are learned, and those of images and texts are logged apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax.data.documents.document import Image, RetrievedDocuments, Text
from magma_jax.data.documents.packing import BlockConfig, Blocks
from magma_jax.families.cm3leon.loss import CM3LeonOptions, cm3leon_loss
from magma_jax.models.language.decoder import Decoder
from magma_jax.nn.modules import merge, split
from magma_jax.training.step.terms import learned_counts, term_means
from magma_jax.typing import IGNORED
from tests.models.test_cm3leon import TINY, VOCABULARY

GRID, LENGTH = 4, 40
CONFIG = dataclasses.replace(TINY, context_length=LENGTH)


@pytest.fixture(scope="module")
def blocks():
    """Names that a reader can learn: every text has its own image."""
    pairs = [(Text(np.array([i, 19 - i])), Image((3 * i + np.arange(GRID)) % 20)) for i in range(20)]
    neighbours = np.random.default_rng(0).integers(0, 20, (20, 3))
    documents = RetrievedDocuments(
        queries=pairs, layout=VOCABULARY, image_tokens=GRID, memory=pairs, neighbours=neighbours, retrieved=1
    )
    return Blocks(documents, BlockConfig(length=LENGTH), batch_size=8, seed=0)


def test_terms_are_those_of_the_plain_form(blocks):
    model = Decoder(dataclasses.replace(CONFIG, embedding_std=0.2), rngs=nnx.Rngs(0))
    batch = next(iter(blocks))
    definition, params = split(model)

    @jax.jit
    def compute(params, batch):
        model = merge(definition, params)
        terms = cm3leon_loss(model, batch, None, options=CM3LeonOptions())
        return terms, model.logits(model(model.embed(batch["tokens"][:, :-1])).hidden)

    terms, logits = compute(params, batch)
    labels = batch["labels"][:, 1:]
    losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0)))
    counted = labels != IGNORED
    parts = {"loss": counted, "image_loss": VOCABULARY.is_image(labels)}
    parts["text_loss"] = counted & ~parts["image_loss"]
    assert all(part.any() for part in parts.values())
    for name, part in parts.items():
        np.testing.assert_allclose(terms[name].total, losses[part].sum(), rtol=1e-5)
        assert terms[name].count == part.sum()
    # Padding is the only thing that is not learned: sentinels and ends of spans are.
    assert (labels == VOCABULARY.eoss).any()
    assert list(learned_counts(terms)) == ["loss"]
    assert term_means(terms)["loss"] == terms["loss"].mean
