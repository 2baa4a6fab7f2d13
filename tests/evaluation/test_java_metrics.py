"""METEOR and SPICE: run where Java and pycocoevalcap are there, and otherwise say what is missing."""

import json
import shutil

import numpy as np
import pytest

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.metrics import java as java_metrics
from magma_jax.evaluation.metrics.by_protocol import METRICS
from magma_jax.evaluation.metrics.ptb import ptb_tokenize


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="METEOR is a program in Java"):
        METRICS["meteor"](["a"], [["a"]])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(java_metrics, "PACKAGE", "no_such_package")
    with pytest.raises(DataError, match="SPICE comes with no_such_package: pip install"):
        METRICS["spice"](["a"], [["a"]])
    monkeypatch.setattr(java_metrics, "_folder", lambda metric: tmp_path)
    with pytest.raises(DataError, match="SPICE needs stanford-corenlp"):
        METRICS["spice"](["a"], [["a"]])


@pytest.mark.slow
def test_meteor_is_that_of_the_package(golden):
    package = pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    content = json.loads((golden / "metrics" / "captions.json").read_text())
    names = sorted(content["references"])[:20]
    said = [content["hypotheses"][name] for name in names]
    said = [text[0] if isinstance(text, list) else text for text in said]
    found = METRICS["meteor"](said, [content["references"][name] for name in names])
    scorer = package.Meteor()
    try:
        total, per_picture = scorer.compute_score(
            {n: [" ".join(ptb_tokenize(c).split()) for c in content["references"][n]] for n in names},
            {n: [" ".join(ptb_tokenize(text).split())] for n, text in zip(names, said, strict=True)},
        )
    finally:
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            pipe.close()
    assert found.total["METEOR"] == pytest.approx(total, rel=1e-9)
    assert found.per_sample["METEOR"] == pytest.approx(per_picture, rel=1e-9)
    assert found.resampled(np.arange(20)) == found.total
