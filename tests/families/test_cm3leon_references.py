"""Retrieved images beside the sequence: rows of a batch, the loss, and decoding equal to the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.convert.layouts import cm3leon as layout
from magma_jax.data.documents.beside import BesideConfig, BesideDocuments, BesideRows, caption_rows, held_out_beside
from magma_jax.data.documents.document import Image, Text
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig, open_openmoji_edits
from magma_jax.data.documents.spans import SpanConfig
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.families.cm3leon import CM3LEON
from magma_jax.families.cm3leon.batch import StreamBatch
from magma_jax.families.cm3leon.generator import CM3Leon, Codes
from magma_jax.families.cm3leon.loading import Loaded
from magma_jax.families.cm3leon.loss import CM3LeonOptions, cm3leon_loss
from magma_jax.families.cm3leon.options import DrawOptions
from magma_jax.families.cm3leon.prompts import Gap, beside, drawing_streams, lay_out_gaps
from magma_jax.inference.decoding.config import SamplingConfig
from magma_jax.models.cm3leon import CM3LeonConfig, CM3LeonModel
from magma_jax.models.references import Places, ReferenceLayers, References, ReferencesConfig
from magma_jax.nn.modules import abstract, merge, split
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.run.config import RunConfig, completed
from magma_jax.typing import IGNORED

GRID, CODES = 4, 12
WORDS = ("red", "a cat with light tone", "a cat with dark tone", "two dogs")
BPE = train_bpe([*WORDS, "Edit first image following the instruction"], 290)
LAYOUT = VocabLayout(text=BPE.vocab_size, image=CODES, sentinels=8)
CONFIG = CM3LeonConfig(
    layers=2,
    width=32,
    heads=2,
    feed_forward=64,
    vocab_rows=LAYOUT.rows,
    vocabulary=LAYOUT,
    context_length=96,
    embedding_std=0.4,
    image_tokens=GRID,
    references=ReferencesConfig(caption_words=8, word_rows=64, strips=2),
)
BESIDE = BesideConfig(images=2, caption_words=8, word_rows=64, skipped=0.0)
PAIRS = [(Text(np.array(BPE.encode(text))), Image(np.array([row, 3, row, 5]))) for row, text in enumerate(WORDS)]


def documents(**changes):
    return BesideDocuments(
        queries=PAIRS,
        memory=PAIRS,
        neighbours=[[1, 2], [2, 0], [1, 3], [0, 1]],
        by_image=[[3, 2], [3, 0], [3, 1], [2, 1]],
        groups=(range(3), (3,)),
        layout=LAYOUT,
        image_tokens=GRID,
        decode=BPE.decode,
        config=dataclasses.replace(BESIDE, **changes),
    )


def ids(text):
    return LAYOUT.from_text(np.array(BPE.encode(text), np.int32)).tolist()


@pytest.fixture(scope="module")
def model():
    def fresh():
        return split(CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[1]

    params = jax.jit(fresh)()
    # Fresh blocks return their input and fresh additions do little, so all get other values.
    keys = iter(jax.random.split(jax.random.key(1), len(params)))
    params = {path: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape) for path, leaf in params.items()}
    graphdef = abstract(lambda: CM3LeonModel(CONFIG, rngs=nnx.Rngs(0)))[0]
    return CM3Leon(Loaded(CONFIG, graphdef, params, BPE, True))


def test_the_gate_is_closed_for_a_share_of_training_rows():
    layers = ReferenceLayers(ReferencesConfig(copy_dropout=0.5), width=8, std=0.4, rngs=nnx.Rngs(0))
    hidden, table = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (64, 3, 8)), (1, (20, 8))))
    given = References(jnp.full((64, 2, GRID), 7), jnp.zeros((64, 3, 16), jnp.int32))
    places = jnp.tile(jnp.array([-1, 0, 3]), (64, 1))
    copied = layers.copied(hidden, table, given, places)
    found = layers.copied(hidden, table, given, places, jax.random.key(2))
    changed = (copied != hidden).any(2)
    assert changed.tolist() == [[False, True, True]] * 64
    is_open = (found == copied).all((1, 2))
    np.testing.assert_array_equal(found, jnp.where(is_open[:, None, None], copied, hidden))
    assert 20 <= is_open.sum() <= 44
    for wrong in ({"copy_dropout": 1.0}, {"copy_dropout": 0.5, "copy": False}):
        with pytest.raises(ValueError, match=r"references\.copy_dropout"):
            ReferencesConfig(**wrong)


def test_a_row_has_the_texts_of_retrieved_images_before_its_own_and_their_codes_beside():
    row, start = documents().row(1, None, None)
    prefix = [LAYOUT.eos, *ids(WORDS[2]), LAYOUT.brk, *ids(WORDS[0]), LAYOUT.brk]
    image = LAYOUT.from_codes(np.array([1, 3, 1, 5])).tolist()
    assert row.tokens.tolist() == [*prefix, *ids(WORDS[1]), LAYOUT.brk, *image, LAYOUT.eos]
    assert start == len(prefix) - 1
    assert row.places[row.places >= 0].tolist() == [0, 1, 2, 3]
    assert LAYOUT.to_codes(row.references).tolist() == [[2, 3, 2, 5], [0, 3, 0, 5]]
    same = row.captions[0] == row.captions[1]
    assert same.tolist() == [True] * 6 + [False, True]  # of "a cat with light tone" and "... dark tone"


def test_a_moved_text_is_hidden_and_its_images_are_found_by_image():
    moved, _ = documents(captions=1.0).row(1, np.random.default_rng(0), None)
    image = LAYOUT.from_codes(np.array([1, 3, 1, 5])).tolist()
    text = [LAYOUT.sentinel(0), *ids(WORDS[1]), LAYOUT.eoss]
    tail = [LAYOUT.sentinel(0), LAYOUT.brk, *image, LAYOUT.eos, *text]
    assert moved.tokens[-len(tail) :].tolist() == tail
    assert not moved.captions[0].any()
    assert LAYOUT.to_codes(moved.references)[0].tolist() == [3, 3, 3, 5]
    for number in range(40):  # places follow the codes wherever spans go
        row, _ = documents().row(1, np.random.default_rng(number), SpanConfig(mean=2.0))
        assert sorted(row.places[LAYOUT.is_image(row.tokens)].tolist()) == [0, 1, 2, 3]
        assert (row.places[~LAYOUT.is_image(row.tokens)] == -1).all()
        np.testing.assert_array_equal(row.tokens[row.places >= 0], np.array(image)[row.places[row.places >= 0]])


def test_rows_resume_and_retrieved_images_may_lack_codes():
    def rows(**changes):
        return BesideRows(documents(**changes), SpanConfig(), 60, batch_size=4, seed=3, rows=range(4))

    whole, resumed = rows(masked=1.0, skipped=0.5), rows(masked=1.0, skipped=0.5)
    first = next(whole)
    resumed.set_state(whole.get_state())
    second = next(whole)
    assert all((array == second[name]).all() for name, array in next(resumed).items())
    assert (first["references"] == LAYOUT.pad).any()
    (held,) = held_out_beside({"test": documents()}, 60)("test", 3, 4, range(4))
    assert (held["labels"][3] == IGNORED).all()  # three of four rows


def test_long_captions_are_cut_and_missing_documents_refused():
    rows = caption_rows(["a b c d", ""], 1, 3, 64)
    assert rows[0].all()
    assert not rows[1].any()
    with pytest.raises(DataError, match="1 retrieved documents, not 2"):
        dataclasses.replace(documents(), neighbours=[[1]] * 4).row(0, None, None)
    with pytest.raises(DataError, match=r"more than data\.length"):
        next(BesideRows(documents(), None, 9, batch_size=2, seed=0, rows=range(2)))
    with pytest.raises(ValueError, match=r"data\.beside\.masked must be 0 to 1, got 2"):
        BesideConfig(masked=2.0)
    with pytest.raises(ValueError, match=r"set data\.annotation"):
        OpenmojiDocumentsConfig(beside=BESIDE)


def test_the_head_may_be_computed_by_ranges(model):
    """The loss over codes is that among codes; a weight of texts scales theirs."""
    batch = next(BesideRows(documents(), SpanConfig(), 60, batch_size=4, seed=3, rows=range(4)))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}

    @jax.jit
    def terms(params):
        module = merge(model.graphdef, params)
        found = [
            cm3leon_loss(module, batch, None, options=CM3LeonOptions(ranges=True, text_weight=weight))
            for weight in (1.0, 3.0)
        ]
        given = References(batch["references"], batch["captions"])
        places = Places(batch["places"][:, :-1], batch["places"][:, 1:])
        hidden = module(module.embed_with(batch["tokens"][:, :-1], given, places)).hidden
        seen = module.seen(batch["tokens"][:, :-1], places.read)
        return found, module.logits(module.head_input(hidden, given, places.drawn, seen))

    (one, three), logits = terms(model.params)
    labels = np.asarray(batch["labels"])[:, 1:]
    is_code, start = LAYOUT.is_image(labels), LAYOUT.image_ids.start
    rest = np.asarray(jax.nn.log_softmax(logits[..., :start]))
    other = np.take_along_axis(rest, np.clip(labels, 0, start - 1)[..., None], -1)[..., 0]
    is_text = (labels != IGNORED) & ~is_code
    codes_only = jax.nn.log_softmax(logits[..., start : LAYOUT.image_ids.stop])
    picked = np.take_along_axis(np.asarray(codes_only), np.clip(labels - start, 0, CODES - 1)[..., None], -1)[..., 0]
    sums = -picked[is_code].sum(), -other[is_text].sum()
    np.testing.assert_allclose(one["loss"].total, sums[0] + sums[1], rtol=1e-5)
    np.testing.assert_allclose(three["loss"].total, sums[0] + 3 * sums[1], rtol=1e-5)
    np.testing.assert_allclose(one["image_loss"].total, sums[0], rtol=1e-5)
    assert float(one["loss"].count) == is_code.sum() + is_text.sum()


def test_decoding_equals_the_full_forward_pass_and_single_requests(model):
    """Guided drawings of a ragged batch, some without documents; every code is the best of the uncached logits."""
    texts = ["red", WORDS[1], "two dogs", "two dogs"]
    shown = [[(WORDS[2], Codes(np.array([2, 3, 2, 5]))), (WORDS[0], Codes(np.array([0, 3, 0, 5])))], [], [], []]
    shown[2] = shown[0][:1]
    options = DrawOptions(guidance=2.0, temperature=(0.0, 0.0))
    drawn = model.draw_codes(texts, options, documents=shown)
    again = model.draw_codes(texts[::-1], options, documents=shown[::-1])
    assert [one.tolist() for one in again[::-1]] == [one.tolist() for one in drawn]
    assert not np.array_equal(drawn[3], drawn[2])  # documents matter
    # So is a running batch that has too few slots for all of them.
    batch, found = StreamBatch(CONFIG, model.graphdef, model.params, count=5, steps=3), {}
    for number, (text, some) in enumerate(zip(texts, shown, strict=True)):
        batch.begin(number, model.engine.drawings(model.engine.plan_texts([text], options, [some]), options), list)
    while batch.busy:
        found |= {key: model.engine.codes_of(finish()) for key, finish in batch.step()}
    assert [found[number].tolist() for number in range(4)] == [one.tolist() for one in drawn]

    # So is what a memory finds for a text.
    plan, _ = model.with_memory(lambda text: shown[texts.index(text)]).plan_drawing(["red"], options)
    found = model.engine.draw(plan, options)[0]
    assert model.engine.codes_of(found).tolist() == drawn[0].tolist()

    pairs = model.media.pairs(shown[0])
    streams = drawing_streams(np.array(BPE.encode("red")), pairs, LAYOUT, GRID, null="sentinel", beside=True)
    new = LAYOUT.from_codes(drawn[0][0])
    whole = [np.concatenate([stream, new]) for stream in streams]
    longest = max(map(len, whole))
    given = [beside(one, pairs, CONFIG, BPE.decode) for one in whole]
    tokens = np.stack([np.pad(one, (0, longest - len(one))) for one in whole])
    places = np.stack([np.pad(one.places, (0, longest - len(one.places)), constant_values=-1) for one in given])

    @jax.jit
    def forward(params):
        module = merge(model.graphdef, params)
        references = References(*(jnp.stack([one[part] for one in given]) for part in (0, 1)))
        where = Places(jnp.asarray(places[:, :-1]), jnp.asarray(places[:, 1:]))
        hidden = module(module.embed_with(jnp.asarray(tokens[:, :-1]), references, where)).hidden
        return module.logits(module.head_input(hidden, references, where.drawn))

    logits = np.asarray(forward(model.params))
    ends = [len(stream) - 1 for stream in streams]
    conditional, without = (logits[row, end : end + GRID] for row, end in enumerate(ends))
    guided = (without + 2.0 * (conditional - without))[:, LAYOUT.image_ids.start : LAYOUT.image_ids.stop]
    assert guided.argmax(1).tolist() == drawn[0][0].tolist()


def test_texts_and_edits_take_documents(model):
    sampling = SamplingConfig(temperature=0.0)
    images, shown = [Codes(np.array([1, 3, 1, 5]))] * 2, [[(WORDS[2], Codes(np.array([2, 3, 2, 5])))], []]
    said = model.captions(images, documents=shown, max_new_tokens=6, sampling=sampling)
    again = model.captions(images, documents=shown[::-1], max_new_tokens=6, sampling=sampling)
    assert again == said[::-1]
    options = DrawOptions(guidance=2.0, image_guidance=1.5, temperature=(0.0, 0.0))
    edits = [(images[0], "light"), (images[0], "dark")]
    found = model.edit_codes(edits, options, documents=[[], shown[0]])
    swapped = model.edit_codes(edits[::-1], options, documents=[shown[0], []])
    assert [one.tolist() for one in swapped[::-1]] == [one.tolist() for one in found]
    with pytest.raises(ValueError, match="takes 2 retrieved documents, got 3"):
        model.draw_codes(["red"], options, documents=[shown[0] * 3])


def test_a_text_behind_an_image_sees_the_mean_of_its_codes(model):
    """Every token of a caption is the best of the uncached logits, and these depend on the codes before it alone."""
    image, found = Codes(np.array([1, 3, 1, 5])), [(WORDS[2], Codes(np.array([2, 3, 2, 5])))]
    sampling = SamplingConfig(temperature=0.0)
    (said,) = model.engine.captioned([image], [found], max_new_tokens=6, sampling=sampling, seed=0, batch=1)
    pairs = model.media.pairs(found)
    prompt, laid = model.engine.with_gaps([Gap("text"), image], pairs)
    whole = np.concatenate([prompt, [LAYOUT.sentinel(0)], said.ids]).astype(np.int32)
    given = beside(whole, pairs, CONFIG, BPE.decode, laid.gaps)

    @jax.jit
    def forward(params, tokens):
        module = merge(model.graphdef, params)
        references = References(*(jnp.asarray(given[part])[None] for part in (0, 1)))
        where = Places(jnp.asarray(given.places)[None], jnp.append(jnp.asarray(given.places)[1:], -1)[None])
        hidden = module(module.embed_with(tokens, references, where)).hidden
        seen = module.seen(tokens, where.read)
        plain = module.logits(module.head_input(hidden, references, where.drawn))
        return module.logits(module.head_input(hidden, references, where.drawn, seen)), plain, seen

    logits, plain, seen = jax.tree.map(lambda leaf: np.asarray(leaf)[0], forward(model.params, whole[None]))
    start = len(prompt)
    texts = logits[start : start + len(said.ids), LAYOUT.text_ids.start : LAYOUT.text_ids.stop]
    assert (texts.argmax(1) + LAYOUT.text_ids.start).tolist() == said.ids.tolist()
    codes = np.asarray(model.params["wte/weight"])[LAYOUT.from_codes(image.codes)]
    left_and_right = codes.reshape(2, 2, -1).sum(0)  # rows and columns of a grid of 2 x 2
    np.testing.assert_allclose(seen.total[-1], left_and_right, rtol=1e-5)
    assert seen.count[[0, start]].tolist() == [[0, 0], [GRID / 2, GRID / 2]]
    first = int(np.flatnonzero(given.places >= 0)[0])
    np.testing.assert_array_equal(logits[:first], plain[:first])  # nothing of what follows
    within = given.places >= 0
    np.testing.assert_array_equal(logits[within][:-1], plain[within][:-1])  # codes are predicted as without it
    assert np.abs(logits[start:] - plain[start:]).max() > 0.1


def test_places_of_gaps_follow_the_grid():
    """A hidden part of an image leaves its places to the codes that fill it in."""
    hidden = Codes(np.array([1, 3, 1, 5]), np.array([False, True, True, False]))
    laid = lay_out_gaps([Gap("text"), hidden], LAYOUT, GRID)
    prompt = np.append(laid.ids, [LAYOUT.sentinel(0), *ids("red"), LAYOUT.eoss, LAYOUT.sentinel(1)])
    filled = np.append(prompt, LAYOUT.from_codes(np.array([7, 8])))
    found = beside(filled, [], CONFIG, BPE.decode, laid.gaps)
    assert found.places[found.places >= 0].tolist() == [0, 3, 1, 2]
    assert not found.captions.any()


def test_beside_an_edit_stands_the_drawing_to_change():
    config = OpenmojiEditsConfig(
        beside=BESIDE,
        length=60,
        image_size=32,
        vocabulary=VocabLayout(text=2048, image=64, sentinels=4),
        image_tokens=4,
    )
    found = open_openmoji_edits(config)
    edit = found.evaluation["test"][0]
    (batch,) = found.validation_batches("test", 1, 1, range(1))
    first = batch["references"][0, 0] - config.vocabulary.image_ids.start
    answer = batch["tokens"][batch["places"] >= 0] - config.vocabulary.image_ids.start
    assert first.tolist() == [4 * edit.source + i for i in range(4)]
    assert answer.tolist() == [4 * edit.target + i for i in range(4)]
    assert (batch["references"][0, 1] > 0).all()


def test_misfits_are_refused(monkeypatch):
    monkeypatch.setattr(layout, "open_folder", lambda folder: (CONFIG, {}))
    with pytest.raises(CheckpointError, match=r"model\.references are additions of this library"):
        layout.published("folder")

    def run(**changes):
        values = {"beside": BESIDE, "annotation": "x", "length": 60} | changes
        return RunConfig(model=CONFIG, data=OpenmojiDocumentsConfig(**values), loss=CM3LeonOptions())

    with pytest.raises(ConfigError, match=r"data\.beside\.images is 1, but model\.references has 2"):
        completed(CM3LEON, run(beside=BesideConfig(images=1)))
    plain = dataclasses.replace(run(beside=BesideConfig()), model=dataclasses.replace(CONFIG, references=None))
    with pytest.raises(ConfigError, match=r"loss\.ranges needs"):
        completed(CM3LEON, dataclasses.replace(plain, loss=CM3LeonOptions(ranges=True)))
    with pytest.raises(ValueError, match=r"loss\.text_weight needs loss\.ranges"):
        CM3LeonOptions(text_weight=2.0)
