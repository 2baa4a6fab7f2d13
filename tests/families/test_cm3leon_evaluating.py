"""The evaluation of a run with retrieved documents: which are shown, its figures, page, and what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.data.documents.openmoji_edits import edits, examples
from magma_jax.data.openmoji import drawings
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.data.tokenizers.layout import VocabLayout
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.families.cm3leon.evaluating.documents import shown_rows
from magma_jax.families.cm3leon.evaluating.measure import Material, measure
from magma_jax.families.cm3leon.evaluating.page import table, write_page
from magma_jax.families.cm3leon.evaluating.run import evaluate_run
from magma_jax.families.cm3leon.evaluating.settings import EvaluationSettings
from magma_jax.families.cm3leon.generator import CM3Leon
from magma_jax.families.cm3leon.loading import Loaded
from magma_jax.models.cm3leon import CM3LeonConfig, CM3LeonModel
from magma_jax.models.references import ReferencesConfig
from magma_jax.models.vision.vqgan import VQGANConfig
from magma_jax.nn.modules import abstract, split
from magma_jax.storage.model_folder import CheckpointError


@pytest.fixture(scope="module")
def data():
    """Drawings of 8 pixels, from the cache of 32 that other tests fill."""
    records, images = drawings.load(Path("~/.cache/magma_jax").expanduser(), 32)
    return records, images[:, ::4, ::4]


def test_documents_of_a_drawing(data):
    records, _ = data
    rows = [record.index for record in records if record.split == "test"]
    assert shown_rows("none", records, rows, 2, annotation=None, seed=0) == [[]] * len(rows)
    at_random = shown_rows("random", records, rows, 2, annotation=None, seed=0)
    by_metadata = shown_rows("oracle", records, rows, 2, annotation=None, seed=0)
    assert {len(set(one)) for one in at_random + by_metadata} == {2}
    assert {records[row].split for one in at_random + by_metadata for row in one} == {"train"}
    for row, found in zip(rows, by_metadata, strict=True):
        target, first, second = records[row], records[found[0]], records[found[1]]
        assert first.base == target.base
        if len(target.tones) == 2:  # between them they have the left and the right tone, where such drawings exist
            has = {(i, one.tones[i % len(one.tones)]) for one in (first, second) if one.tones for i in (0, 1)}
            assert len(set(enumerate(target.tones)) & has) >= 1
    with pytest.raises(ConfigError, match=r"no data\.annotation"):
        shown_rows("retrieved", records, rows, 2, annotation=None, seed=0)


def test_an_edit_has_an_example_of_its_answer(data):
    records, _ = data
    asked = edits(records, "test")
    for edit, example in zip(asked, examples(records, asked), strict=True):
        assert example not in (None, edit.source, edit.target)
        assert (records[example].base, records[example].split) == (records[edit.target].base, "train")


def tiny_model(records, **changes):
    """A model that has learnt nothing."""
    tokenizer = train_bpe([record.caption for record in records], 300)
    layout = VocabLayout(text=tokenizer.vocab_size, image=64, sentinels=4)
    config = CM3LeonConfig(
        layers=1,
        width=32,
        heads=2,
        feed_forward=32,
        vocab_rows=layout.rows,
        vocabulary=layout,
        context_length=256,
        image_tokens=16,
        tokenizer=VQGANConfig(
            image_size=8,
            width=32,
            multipliers=(1, 1),
            blocks=1,
            attention_sizes=(),
            latent_channels=8,
            code_width=8,
            codes=64,
        ),
        **changes,
    )
    params = jax.jit(lambda: split(CM3LeonModel(config, rngs=nnx.Rngs(0)))[1])()
    graphdef = abstract(lambda: CM3LeonModel(config, rngs=nnx.Rngs(0)))[0]
    return CM3Leon(Loaded(config, graphdef, params, tokenizer, True))


def some_material(data, folder, **changes):
    """Four held-out drawings, whose documents are those of the same name."""
    records, images = data
    rows = [record.index for record in records if record.split == "test"][:4]
    annotation = folder / "found"
    annotation.mkdir()
    shown = shown_rows("oracle", records, rows, 2, annotation=None, seed=0)
    lines = [
        {"id": records[row].codepoints, "documents": [records[one].codepoints for one in found], "scores": [1.0, 1.0]}
        for row, found in zip(rows, shown, strict=True)
    ]
    (annotation / "part-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (annotation / "annotation.json").write_text(json.dumps({"parts": 1}))
    fields = {
        "records": records,
        "images": images,
        "rows": rows,
        "edits": edits(records, "test"),
        "judge": DrawingJudge(records, images, lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32)),
        "documents": 2,
        "annotation": str(annotation),
        "by_image": str(annotation),
    }
    return Material(**fields | changes)


@pytest.mark.slow
def test_figures_and_page(data, tmp_path):
    """Of a model that has learnt nothing: all rows are there, and the true drawings are exact."""
    model = tiny_model(data[0], references=ReferencesConfig(word_rows=64))
    material = some_material(data, tmp_path)
    settings = EvaluationSettings(edits=4, batch=4, guidance=2.0)
    found = measure(model, material, settings)
    drawing = found.figures["drawing"]
    assert set(drawing) == {*settings.drawings, "shuffled", "document", "round_trip", "n"}
    assert drawing["document"]["exact"] == 0
    assert set(found.figures["perplexity"]) == {"retrieved", "oracle", "random", "none"}
    assert found.figures["perplexity"]["retrieved"] == found.figures["perplexity"]["oracle"]
    assert found.figures["edit"]["all"]["n"] == 4
    assert len(found.said) == 4
    assert found.figures["retrieval"]["by text"] == {"first": 100.0, "any": 100.0}
    assert "documents by metadata" in table(found.figures)

    protocol = {"checkpoint_step": 3, "training_seed": 0, "split": "test", "settings": {"guidance": 2.0}}
    page = tmp_path / "report.html"
    write_page(page, found, material, protocol, tmp_path / "metrics.jsonl")
    html = page.read_text()
    assert html.count("<figcaption>result") == 4
    assert html.count("<figcaption>drawn<") == 4
    assert "$" not in html.replace("${", "")


@pytest.mark.slow
def test_a_model_that_takes_no_documents(data, tmp_path):
    """It is shown none: rows that differ by their documents alone are left out, and there is no first document."""
    material = some_material(data, tmp_path, documents=0, edits=[])
    found = measure(tiny_model(data[0]), material, EvaluationSettings(batch=4))
    drawing = found.figures["drawing"]
    assert {"retrieved", "shuffled", "round_trip"} <= set(drawing)
    assert not {"document", "oracle", "random", "none"} & set(drawing)
    assert found.figures["text"]["document"] == 0
    assert len(found.said) == 4


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="drawings name 'orakel', which is none of retrieved, oracle"):
        EvaluationSettings(drawings=("retrieved", "orakel"))
    with pytest.raises(ValueError, match="drawings must name 'retrieved'"):
        EvaluationSettings(drawings=("none",))
    with pytest.raises(ValueError, match="edits must be at least 1, got 0"):
        EvaluationSettings(edits=0)
    with pytest.raises(ConfigError, match=r"--set.*guidence"):
        evaluate_run(tmp_path, settings=["guidence=3"])
    (tmp_path / "model.json").write_text(json.dumps({"format": 1, "model": {"kind": "cm3leon"}}))
    with pytest.raises(CheckpointError):
        evaluate_run(tmp_path)
