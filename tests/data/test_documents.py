"""Documents and blocks: the sequence of the paper, nothing lost, no image cut, exact resuming."""

import itertools
import json

import numpy as np
import pytest

from magma_jax.data.documents.document import Image, RetrievedDocuments, Text, make_document
from magma_jax.data.documents.packing import BlockConfig, Blocks
from magma_jax.data.documents.spans import SpanConfig
from magma_jax.data.format.records import DataError
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.typing import IGNORED

GRID = 16
LAYOUT = VocabLayout(text=4000, image=2000, sentinels=32)
EOS, BREAK, PAD = LAYOUT.eos, LAYOUT.brk, LAYOUT.pad


def pair(number, length=None):
    """Text ``number`` repeated, and an image that says which codes are where."""
    length = 1 + number % 7 if length is None else length
    return Text(np.full(length, number)), Image((number * 40 + np.arange(GRID)) % 2000)


def documents(count=40, retrieved=2, **changes):
    memory = [pair(number) for number in range(100, 160)]
    neighbours = np.random.default_rng(0).integers(0, 60, (count, 4))
    options = {"queries": [pair(i) for i in range(count)], "memory": memory, "neighbours": neighbours}
    return RetrievedDocuments(layout=LAYOUT, image_tokens=GRID, retrieved=retrieved, **options | changes)


def first(blocks, count):
    iterator = iter(blocks)
    return iterator, list(itertools.islice(iterator, count))


def test_a_document_is_the_sequence_of_the_paper():
    got = make_document([*pair(3, 2), *pair(5, 1)], LAYOUT, image_tokens=GRID)
    text, image = LAYOUT.text_ids.start, LAYOUT.image_ids.start
    grids = [image + number * 40 + np.arange(GRID) for number in (3, 5)]
    expected = [EOS, text + 3, text + 3, BREAK, *grids[0], BREAK, text + 5, BREAK, *grids[1], EOS]
    np.testing.assert_array_equal(got.tokens, expected)
    assert got.tokens.dtype == np.int32
    for (start, stop), grid in zip(got.images, grids, strict=True):
        np.testing.assert_array_equal(got.tokens[start:stop], grid)


@pytest.mark.parametrize("retrieved", [0, 1, 2, 3])
def test_retrieved_pairs_come_first_and_vary(retrieved):
    source = documents(retrieved=retrieved)
    seen = set()
    for seed in range(20):
        got = source.draw(7, np.random.default_rng(seed))
        assert len(got.images) == retrieved + 1
        parts = np.split(got.tokens[1:-1], np.flatnonzero(got.tokens[1:-1] == BREAK))
        texts = [int(LAYOUT.to_text(part[-1:])[0]) for part in parts[::2]]
        assert texts[-1] == 7
        assert set(texts[:-1]) <= {100 + int(row) for row in source.neighbours[7]}
        seen.add(tuple(texts))
    assert (len(seen) > 1) == (retrieved > 0)


@pytest.mark.parametrize("length", [80, 100, 333])
def test_blocks_hold_every_document_of_an_epoch_and_cut_no_image(length):
    source = documents(count=50)
    blocks = Blocks(source, BlockConfig(length=length, spans=None), batch_size=2, seed=3)
    iterator, batches = first(blocks, 60)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert tokens.shape == (120, length + 1)
    labels = np.concatenate([batch["labels"] for batch in batches])
    np.testing.assert_array_equal(labels, np.where(tokens == PAD, IGNORED, tokens))
    images = LAYOUT.is_image(tokens)
    # A run of codes is a whole image or several: it is never cut at a border.
    for row, codes in zip(tokens, images, strict=True):
        assert not codes[0]
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], codes, [0]]))))[::2]
        assert set(runs) <= {GRID}
        # Nor does a block begin with the break before an image.
        assert not (row[0] == BREAK and codes[1])
        padding = np.flatnonzero(row == PAD)
        assert len(padding) == 0 or padding[0] == length + 1 - len(padding)
    # Every query of the first epochs occurs once in each, up to those that wait.
    queries = tokens[(tokens == EOS) | LAYOUT.is_text(tokens)]
    counts = np.bincount(LAYOUT.to_text(queries[LAYOUT.is_text(queries)]), minlength=50)[:50]
    lengths = 1 + np.arange(50) % 7
    state = iterator.get_state()
    epochs = state["position"] / 50
    assert np.all(np.abs(counts / lengths - epochs) <= 1.01)
    assert state["padding"] == (tokens == PAD).sum()
    assert state["blocks"] == 120
    assert state["moved"] > 0


def test_long_texts_are_cut_and_joined():
    texts = [Text(np.arange(start, start + 700)) for start in (0, 1000, 2000)]
    queries = [(text, Image(np.arange(GRID))) for text in texts]
    source = documents(retrieved=0, queries=queries)
    with pytest.raises(DataError, match=r"sample [012] has 719 tokens with .* more than a block of 101"):
        first(Blocks(source, BlockConfig(length=100), batch_size=1, seed=0), 1)
    with pytest.raises(DataError, match="every document is longer than a block of 101"):
        first(Blocks(source, BlockConfig(length=100, overlong="skip"), batch_size=1, seed=0), 1)
    # Without images, the blocks are one stream.
    source = RetrievedDocuments(queries=[(text,) for text in texts], layout=LAYOUT, image_tokens=GRID, retrieved=0)
    iterator, batches = first(Blocks(source, BlockConfig(length=100, spans=None), batch_size=1, seed=0), 22)
    stream = np.concatenate([batch["tokens"][0] for batch in batches])
    assert PAD not in stream
    per_document = np.split(stream, np.flatnonzero((stream[:-1] == EOS) & (stream[1:] == EOS)) + 1)
    assert [len(part) for part in per_document[:3]] == [702] * 3
    assert iterator.moved == iterator.padding == 0


def test_skipped_documents_are_counted():
    queries = [pair(i, 100 if i % 4 == 0 else 3) for i in range(40)]
    source = documents(retrieved=0, queries=queries)
    iterator, batches = first(Blocks(source, BlockConfig(length=80, overlong="skip"), batch_size=1, seed=0), 30)
    state = iterator.get_state()
    assert state["skipped"] == pytest.approx(state["position"] / 4, abs=3)
    texts = {int(token) for batch in batches for token in batch["tokens"][LAYOUT.is_text(batch["tokens"])]}
    assert all((token - LAYOUT.text_ids.start) % 4 for token in texts)


CONFIGS = [BlockConfig(length=90), BlockConfig(length=150, spans=SpanConfig(rotation=0.5), lookahead=2)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("read", [1, 2, 13, 60])
def test_a_restored_iterator_continues_with_the_next_token(config, read):
    blocks = Blocks(documents(), config, batch_size=2, seed=5)
    iterator, _ = first(blocks, read)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 5))
    restored = iter(blocks)
    next(restored)
    restored.set_state(state)
    assert restored.get_state() == state
    for batch in expected:
        for name, array in next(restored).items():
            np.testing.assert_array_equal(array, batch[name])
    assert restored.get_state() == iterator.get_state()
    restored.close()


def test_processes_form_the_same_blocks_and_seeds_differ():
    source, config = documents(), BlockConfig(length=90)
    _, whole = first(Blocks(source, config, batch_size=4, seed=1), 5)
    _, part = first(Blocks(source, config, batch_size=4, seed=1, rows=[2, 3]), 5)
    _, other = first(Blocks(source, config, batch_size=4, seed=2), 5)
    for one, two, three in zip(whole, part, other, strict=True):
        np.testing.assert_array_equal(one["tokens"][2:], two["tokens"])
        assert (one["tokens"] != three["tokens"]).any()
    tokens = np.concatenate([batch["tokens"] for batch in whole])
    sentinels = np.isin(tokens, LAYOUT.sentinel_ids).any(axis=1)
    assert 0 < sentinels.sum() < len(tokens)
    assert np.all(np.isin(LAYOUT.eoss, tokens[sentinels]))


def test_padding_of_the_published_sizes_is_reported():
    """Three pairs of 1,024 codes in 4,097 tokens: about a quarter of a block is padding, as nothing else fits."""
    layout = VocabLayout()
    queries = [(Text(np.full(20, i)), Image(np.full(1024, i))) for i in range(64)]
    options = {"layout": layout, "image_tokens": 1024, "queries": queries, "memory": queries}
    source = RetrievedDocuments(**options, neighbours=np.arange(128).reshape(64, 2) % 64, retrieved=2)
    iterator, _ = first(Blocks(source, BlockConfig(spans=None), batch_size=1, seed=0), 20)
    assert iterator.padding / (20 * 4097) == pytest.approx(1 - (3 * 1044 + 7) / 4097, abs=0.02)
    source = RetrievedDocuments(**options, neighbours=np.arange(192).reshape(64, 3) % 64, retrieved=3)
    with pytest.raises(DataError, match="4185 tokens with its retrieved documents, more than a block of 4097"):
        first(Blocks(source, BlockConfig(), batch_size=1, seed=0), 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: documents(retrieved=4), "retrieved must be 0 to 3, got 4"),
        (lambda: documents(neighbours=[[0, 1]]), "neighbours of 1 samples, but 40 samples"),
        (
            lambda: documents(neighbours=[[1]] * 40).draw(4, np.random.default_rng(0)),
            "sample 4 has 1 retrieved documents, not 2; search again",
        ),
        (
            lambda: documents(neighbours=[[60, 60]] * 40).draw(4, np.random.default_rng(0)),
            "sample 4 names document 60, but the memory has 60",
        ),
        (
            lambda: make_document([Image(np.arange(17))], LAYOUT, image_tokens=16),
            "an image has 17 codes, not the 16 of the grid",
        ),
        (lambda: make_document([], LAYOUT, image_tokens=16), "no text and no image"),
        (
            lambda: documents(retrieved=0, queries=[(Text(np.array([4000])), Image(np.arange(GRID)))]).draw(
                0, np.random.default_rng(0)
            ),
            "sample 0 or a document retrieved for it: text token 4000 is not one of",
        ),
        (lambda: Blocks(documents(queries=[], neighbours=[]), BlockConfig(), batch_size=1, seed=0), "no documents"),
        (lambda: BlockConfig(length=1), "data.length must be at least 2"),
        (lambda: BlockConfig(lookahead=0), "data.lookahead must be at least 1"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
