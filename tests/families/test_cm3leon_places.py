"""Vectors of places in the grid: read from blocks with moved spans, and the same in decoding as in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.convert.layouts import cm3leon as layout
from magma_jax.data.documents.document import Image, Text, make_document
from magma_jax.data.documents.places import image_places
from magma_jax.data.documents.spans import SpanConfig, cm3_block
from magma_jax.families.cm3leon.batch import StreamBatch
from magma_jax.families.cm3leon.generator import CM3Leon, Codes
from magma_jax.families.cm3leon.loading import Loaded
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import drawing_streams
from magma_jax.models.cm3leon import CM3LeonModel
from magma_jax.models.references import Places
from magma_jax.nn.modules import abstract, merge, split
from magma_jax.storage.model_folder import CheckpointError
from tests.families.test_cm3leon_decoding import BPE, GRID, LAYOUT
from tests.families.test_cm3leon_decoding import CONFIG as PLAIN

CONFIG = dataclasses.replace(PLAIN, grid_positions=True)


def test_places_follow_codes_wherever_spans_go():
    """Codes name their places here, so that they can be compared in blocks of several images and spans."""
    parts = [Text(np.array(BPE.encode("red"))), Image(np.arange(GRID)), Text(np.array(BPE.encode("two dogs")))]
    document = make_document([*parts, Image(np.arange(GRID))], LAYOUT, image_tokens=GRID).tokens
    ids = {"brk": LAYOUT.brk, "eoss": LAYOUT.eoss, "sentinels": LAYOUT.sentinel_ids}
    moved = 0
    for seed in range(100):
        config = SpanConfig(mean=2.0, rotation=seed % 2 * 0.5)
        block = cm3_block(document, np.random.default_rng(seed), config, length=60, **ids)
        moved += len(block) > len(document)
        is_code = LAYOUT.is_image(block)
        places = image_places(block, LAYOUT)
        np.testing.assert_array_equal(places[is_code], LAYOUT.to_codes(block[is_code]))
        assert (places[~is_code] == -1).all()
    assert moved > 50


def test_drawings_behind_documents_read_the_places_that_training_reads():
    def fresh():
        return split(CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[1]

    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = {path: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape) for path, leaf in jax.jit(fresh)().items()}
    graphdef = abstract(lambda: CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[0]
    model = CM3Leon(Loaded(CONFIG, graphdef, params, BPE, True))
    shown = [("two dogs", Codes(np.array([2, 3, 2, 5])))]
    options = DrawOptions(guidance=2.0, temperature=(0.0, 0.0))
    drawn = model.draw_codes(["red", "two dogs"], options, documents=[shown, []])
    batch = StreamBatch(CONFIG, graphdef, params, count=3, steps=GRID)
    plan = model.engine.plan_texts(["red"], options, [shown])
    batch.begin("red", model.engine.drawings(plan, options), model.engine.codes_of)
    ((_, finish),) = batch.step()
    assert finish().tolist() == drawn[0].tolist()

    streams = drawing_streams(np.array(BPE.encode("red")), model.media.pairs(shown), LAYOUT, GRID, null="sentinel")
    whole = [np.concatenate([stream, LAYOUT.from_codes(drawn[0][0])]) for stream in streams]
    longest = max(map(len, whole))
    tokens = np.stack([np.pad(one, (0, longest - len(one))) for one in whole])
    places = np.stack([image_places(row, LAYOUT) for row in tokens])
    assert places[0][places[0] >= 0].tolist() == [*range(GRID), *range(GRID)]

    @jax.jit
    def forward(params):
        module = merge(graphdef, params)
        where = Places(jnp.asarray(places[:, :-1]), jnp.asarray(places[:, 1:]))
        return module.logits(module(module.embed_with(jnp.asarray(tokens[:, :-1]), None, where)).hidden)

    logits = np.asarray(forward(params))
    conditional, without = (logits[row, len(one) - 1 :][:GRID] for row, one in enumerate(streams))
    guided = (without + 2.0 * (conditional - without))[:, LAYOUT.image_ids.start : LAYOUT.image_ids.stop]
    assert guided.argmax(1).tolist() == drawn[0][0].tolist()

    # A running batch reads them too.
    batch = StreamBatch(CONFIG, graphdef, params, count=3, steps=2)
    batch.begin("red", model.engine.drawings(model.engine.plan_texts(["red"], options, [shown]), options), list)
    found = [finish() for _ in range(GRID) for _, finish in batch.step()]
    assert LAYOUT.to_codes(found[0][0].ids).tolist() == drawn[0][0].tolist()


def test_a_published_layout_has_no_such_vectors_and_grids_are_square(monkeypatch):
    monkeypatch.setattr(layout, "open_folder", lambda folder: (CONFIG, {}))
    with pytest.raises(CheckpointError, match=r"model\.grid_positions are additions of this library"):
        layout.published("folder")
    with pytest.raises(ValueError, match="needs a square grid; image_tokens is 8"):
        dataclasses.replace(CONFIG, image_tokens=8)
