"""The evaluation of a run that draws: its tasks, figures, page, and what it refuses."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.data.openmoji import drawings
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.evaluation.drawings import DrawingJudge
from magma_jax.families.magvlt.evaluating.edits import edits_of
from magma_jax.families.magvlt.evaluating.measure import measure
from magma_jax.families.magvlt.evaluating.page import table, write_page
from magma_jax.families.magvlt.evaluating.run import evaluate_run
from magma_jax.families.magvlt.evaluating.settings import EvaluationSettings
from magma_jax.families.magvlt.generator import Magvlt
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import CheckpointError
from tests.families.magvlt_tiny import MODEL

SIZE = 32


@pytest.fixture(scope="module")
def data():
    """Drawings of 16 pixels, from the cache of 32 that other tests fill."""
    records, images = drawings.load(Path("~/.cache/magma_jax").expanduser(), SIZE)
    return records, images[:, ::2, ::2]


def held_out(records, attribute=""):
    return [record.index for record in records if record.split == "test" and record.base.endswith(attribute)]


def test_an_edit_changes_one_attribute_of_a_training_drawing(data):
    records, images = data
    edits = edits_of(records, images, held_out(records), (4, 4))
    kinds = {kind: [edit for edit in edits if edit.attribute == kind] for kind in ("tone", "hair")}
    assert len(kinds["tone"]) > 150
    assert len(kinds["hair"]) > 3
    for edit in edits:
        source, target = records[edit.source], records[edit.target]
        assert (source.split, target.split) == ("train", "test")
        assert edit.places.shape == (16,)
        assert edit.places.any()
    for edit in kinds["tone"]:
        assert records[edit.source].base == records[edit.target].base
        assert records[edit.source].tones != records[edit.target].tones
    for edit in kinds["hair"]:
        source, target = records[edit.source], records[edit.target]
        assert (source.tones, source.gender) == (target.tones, target.gender)
        assert source.base != target.base
        assert edit.places.tolist() == [True] * 12 + [False] * 4


@pytest.mark.slow
def test_figures_and_page(data, tmp_path):
    """Of a model that has learnt nothing: kept codes are kept, and each control is there."""
    records, images = data
    # As many drawings as edits, so that both take the same programs.
    rows = held_out(records, " hair")[:2] + [row for row in held_out(records) if len(records[row].tones) == 2][:2]
    texts = [record.caption for record in records if record.split != "train"]
    tokenizer = train_bpe(texts, 300)
    config = dataclasses.replace(MODEL, layers=1, text_positions=40)
    model = Magvlt(config, split(MagvltModel(config, rngs=nnx.Rngs(0)))[1], tokenizer)
    some = sorted({*rows, *(edit.source for edit in edits_of(records, images, rows, (4, 4)))})
    few = [dataclasses.replace(records[row], index=i) for i, row in enumerate(some)]
    judge = DrawingJudge(few, images[some], lambda pixels: pixels.reshape(len(pixels), -1).astype(np.float32))
    settings = EvaluationSettings(steps=2, text_steps=2)
    chosen = [some.index(row) for row in rows]
    found = measure(model, few, images[some], chosen, judge, settings)
    drawing = found.figures["drawing"]
    assert set(drawing) == {"model", "one_step", "shuffled", "likeliest", "round_trip", "n"}
    assert drawing["n"]["exact"] == 4
    assert drawing["model"]["equal_codes"] < 60
    assert drawing["round_trip"]["equal_codes"] == 100
    assert found.figures["edit"]["kept_codes"] == 100
    assert found.figures["edit"]["hair"]["n"] == 2
    assert set(found.figures["text"]) == {"predicted_length", "true_length", "shuffled", "length", "n"}
    again = measure(model, few, images[some], chosen, judge, settings)
    np.testing.assert_array_equal(again.drawn, found.drawn)
    assert "true drawing, encoded and decoded" in table(found.figures)

    protocol = {"checkpoint_step": 3, "training_seed": 0, "split": "test", "settings": {"steps": 2}}
    page = tmp_path / "report.html"
    write_page(page, found, few, images[some], model, settings, protocol, tmp_path / "metrics.jsonl")
    html = page.read_text()
    assert html.count('<div class="strip">') == 4
    assert len(re.findall("<figcaption>drawn anew", html)) == len(found.edits)
    assert "$" not in html.replace("${", "")


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        EvaluationSettings(steps=0)
    with pytest.raises(ValueError, match="guidance must not be negative"):
        EvaluationSettings(guidance=-1.0)
    with pytest.raises(ConfigError, match=r"--set.*stepps"):
        evaluate_run(tmp_path, settings=["stepps=3"])
    (tmp_path / "model.json").write_text(json.dumps({"format": 1, "model": {"kind": "magvlt"}}))
    with pytest.raises(CheckpointError):
        evaluate_run(tmp_path)
