"""Documents of folders of codes and texts: templates, retrieved pairs, and what is refused."""

import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.data.datasets import load_dataset
from magma_jax.data.documents.bank import open_bank
from magma_jax.data.documents.folders import DocumentFoldersConfig
from magma_jax.data.documents.openmoji import OpenmojiDocumentsConfig
from magma_jax.data.documents.openmoji_edits import OpenmojiEditsConfig, edits
from magma_jax.data.documents.templates import TEMPLATES, parse_template
from magma_jax.data.format.code_folder import StoredCodes
from magma_jax.data.format.record_folder import StoredRecords
from magma_jax.data.format.records import DataError
from magma_jax.data.openmoji import drawings
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.data.write.encoding import encode_folder
from magma_jax.retrieval.annotate import annotate
from magma_jax.retrieval.build import build_bank
from magma_jax.retrieval.encoders import HashedEncoder
from magma_jax.retrieval.search import ExactIndex
from magma_jax.retrieval.sources import FolderDocuments, OpenmojiDocuments, open_documents
from magma_jax.typing import IGNORED
from tests import datafolders
from tests.data.test_codes import GRID, Means, options

LAYOUT = VocabLayout(text=300, image=256, sentinels=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset folder, its codes, a tokenizer, a bank with codes, and its annotation."""
    root = tmp_path_factory.mktemp("documents")
    datafolders.folder(root / "images", datafolders.captions())
    encode_folder(root / "images", root / "codes", Means(), options())
    train_bpe(["Describe the given picture. a red square"] * 4, 280).save(root)
    encoder, source = HashedEncoder(words=64), FolderDocuments(root / "images", codes=root / "codes")
    build_bank(source, encoder, root / "bank", progress=False)
    bank = open_bank(root / "bank")
    annotate(
        source,
        bank,
        encoder,
        ExactIndex(bank.vectors),
        root / "found",
        splits=("train",),
        candidates=12,
        max_similarity=1.0,
        progress=False,
    )
    return root


def config(root, **changes):
    values = {
        "folders": {"train": (str(root / "codes"),), "test": (str(root / "codes"),)},
        "tokenizer": str(root / "tokenizer.json"),
        "length": 200,
        "spans": None,
        "vocabulary": LAYOUT,
        "image_tokens": GRID**2,
    }
    return DocumentFoldersConfig(**values | changes)


def test_documents_are_texts_and_codes(folders):
    data = load_dataset(config(folders))
    (batch,) = data.validation_batches("test", 2, 2, [0, 1])
    records = StoredRecords(folders / "images")
    caption = records.text(0).captions[0]
    ids = LAYOUT.from_text(np.array(data.tokenizer.encode(caption)))
    row = batch["tokens"][0]
    assert row[0] == LAYOUT.eos
    np.testing.assert_array_equal(row[1 : 1 + len(ids)], ids)
    assert row[1 + len(ids)] == LAYOUT.brk
    codes = LAYOUT.to_codes(row[2 + len(ids) : 2 + len(ids) + GRID**2])
    np.testing.assert_array_equal(codes, StoredCodes(folders / "codes")[0][0])
    assert row[2 + len(ids) + GRID**2] == LAYOUT.eos
    # Every caption is a document.
    captions = sum(len(records.text(i).captions) for i in range(len(records)))
    assert len(data.evaluation["train"]) == captions > len(records)


def test_retrieved_pairs_come_first_and_have_no_validation_labels(folders):
    retrieved = {"retrieved": 1, "memory": str(folders / "bank"), "annotation": str(folders / "found")}
    data = load_dataset(config(folders, **retrieved))
    (batch,) = data.validation_batches("test", 1, 1, [0])
    row, labels = batch["tokens"][0], batch["labels"][0]
    assert (row == LAYOUT.brk).sum() == 3
    second = np.flatnonzero(row == LAYOUT.brk)[1]
    assert (labels[: second + 1] == IGNORED).all()
    np.testing.assert_array_equal(labels[second + 1 :], row[second + 1 :])
    trained = next(iter(data.batches(2, 0, [0, 1])))
    assert trained["tokens"].shape == (2, 201)
    assert LAYOUT.is_image(trained["tokens"]).any()


def test_training_resumes_amid_an_epoch(folders):
    data = load_dataset(config(folders))
    batches = iter(data.batches(2, 3, [0, 1]))
    for _ in range(2):
        next(batches)
    state, after = batches.get_state(), [next(batches) for _ in range(3)]
    again = iter(data.batches(2, 3, [0, 1]))
    again.set_state(state)
    for batch in after:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])


def test_templates():
    edit = parse_template("edit")
    assert edit.fields == {"source", "instruction", "image"}
    first, second = np.arange(3), np.arange(3, 6)
    filled = edit.fill({"source": first, "instruction": "make it red", "image": second}, "sample")
    assert filled[0] == "Edit first image following the instruction"
    assert filled[1] is first
    assert filled[2:3] == ["make it red"]
    question = parse_template("question").fill({"question": "What?", "answer": "a cat", "image": first}, "sample")
    assert question[0] == "Question: What? Answer: a cat."
    for name in TEMPLATES:
        assert parse_template(name).segments[-1] == "{image}"
    with pytest.raises(DataError, match="sample has no field 'answer', which the template asks for"):
        parse_template("{text} {answer} | {image}").fill({"text": "a", "image": first}, "sample")
    for text, message in (
        ("{text} | | {image}", "a segment is empty"),
        ("{text | {image}", "braces hold the name of a field"),
        ("see {image} | {text}", "the image image is a segment of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_template(text)


def test_a_template_of_captions(folders):
    data = load_dataset(config(folders, template="caption"))
    (batch,) = data.validation_batches("test", 1, 1, [0])
    row = batch["tokens"][0]
    assert data.tokenizer.decode(LAYOUT.to_text(row[LAYOUT.is_text(row)]).tolist()).startswith(
        "Describe the given picture. "
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"folders": {}}, ConfigError, "data.folders names no folders to train on"),
        ({"image_tokens": 9}, DataError, "has 16 codes of an image from a codebook of 256, but the model's grid has 9"),
        ({"tokenizer": "nowhere"}, ConfigError, "data.tokenizer: nowhere is not there"),
        ({"template": "question"}, DataError, "has no questions, which the template asks for"),
        ({"vocabulary": None}, ConfigError, "data.vocabulary and data.image_tokens are the model's"),
    ],
)
def test_refusals(folders, changes, error, message):
    with pytest.raises(error, match=message):
        load_dataset(config(folders, **changes))


def test_openmoji_is_retrieved_from_its_training_drawings(tmp_path, monkeypatch):
    records = [
        drawings.Drawing(i, f"A{i}", f"thing {i}", f"thing {i}", f"thing {i}", "thing", None, (), 0, split)
        for i, split in enumerate(["train"] * 5 + ["validation", "test"])
    ]
    images = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3)).astype(np.uint8)
    monkeypatch.setattr(drawings, "load", lambda *_: (records, images))
    encoder, source = HashedEncoder(words=64), OpenmojiDocuments()
    build_bank(source, encoder, tmp_path / "bank", progress=False)
    bank = open_bank(tmp_path / "bank")
    assert len(bank) == 5
    splits = ("train", "validation", "test")
    annotate(
        source, bank, encoder, ExactIndex(bank.vectors), tmp_path / "found", splits=splits, candidates=5, progress=False
    )
    layout = VocabLayout(text=2048, image=64, sentinels=8)
    settings = {"length": 100, "vocabulary": layout, "image_tokens": 16, "spans": None}
    data = load_dataset(OpenmojiDocumentsConfig(retrieved=1, annotation=str(tmp_path / "found"), **settings))
    (batch,) = data.validation_batches("test", 1, 1, [0])
    row = batch["tokens"][0]
    places = row[row >= layout.image_ids.start] - layout.image_ids.start
    # Placeholders: a training drawing, then drawing 6.
    assert places[:16].tolist() != places[16:].tolist()
    assert places[0] // 16 < 5
    assert places[16:].tolist() == list(range(96, 112))
    with pytest.raises(ValueError, match="--codes: drawings of openmoji are encoded by the model"):
        open_documents("openmoji", codes="x")


def test_edits_differ_by_one_attribute():
    def drawing(i, base, concept, gender, tones, split="train"):
        return drawings.Drawing(i, f"A{i}", base, base, concept, "person", gender, tones, 1, split)

    records = [
        drawing(0, "woman cook", "cook", "woman", ("dark",)),
        drawing(1, "woman cook", "cook", "woman", ()),
        drawing(2, "man cook", "cook", "man", ("dark",), "test"),
        drawing(3, "man red hair", "red hair", "man", ()),
        drawing(4, "man bald", "bald", "man", ()),
    ]
    assert edits(records, "train") == [
        (0, "make the skin tone yellow", 1),
        (1, "make the skin tone dark", 0),
        (3, "make it bald", 4),
        (4, "make the hair red", 3),
    ]
    assert edits(records, "test") == [(0, "make it a man", 2)]


def test_edits_are_documents_of_two_drawings():
    layout = VocabLayout(text=2048, image=64, sentinels=8)
    data = load_dataset(OpenmojiEditsConfig(length=100, image_size=32, vocabulary=layout, image_tokens=4))
    (batch,) = data.validation_batches("test", 1, 1, [0])
    row, edit = batch["tokens"][0], data.evaluation["test"][0]
    places = row[row >= layout.image_ids.start] - layout.image_ids.start
    assert (places // 4).tolist() == [edit.source] * 4 + [edit.target] * 4
    text = data.tokenizer.decode(layout.to_text(row[layout.is_text(row)]).tolist())
    assert text == f"Edit first image following the instruction{edit.instruction}"
    with pytest.raises(ValueError, match="edits have the drawing to change before them"):
        OpenmojiEditsConfig(retrieved=1, annotation="x")
