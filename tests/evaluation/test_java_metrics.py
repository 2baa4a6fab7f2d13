"""METEOR and SPICE: run where Java and pycocoevalcap are there, and otherwise say what is missing."""

import json
import random
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


_VOCABULARY = (
    "a the man woman dog is isn't it's they're can't boys' cannot gonna o'clock rock'n'roll y'all ma'am 'tis n't on in "
    "no. No. lbs. ft. oz. U.S. a.m. p.m. etc. vs. Mr. Mrs. Dr. St. Jr. Inc. Co. Ave. Jan. e.g. D.C. C S TV iPhone NYC "
    "New York T-shirt half-eaten up-to-date X-ray mid-air black-and-white and/or w/ w/o he/she AT&T B&W caf\u00e9 "
    "na\u00efve don\u2019t 12 3.5 1,000 7:30 50% $5 #1 2x4 1/2 3/4 24/7 5th 22nd 1990's '90s .com www.foo.com STOP "
    "sign reads The It"
)
WORDS = _VOCABULARY.split()
COMMON = [".", ",", ";", ":", "!", "?", '"', "'", "-", "(", ")", "/", "..."]
RARE = [*"[]{}\\&*#@%$+=<>~^_|`", "..", "....", "--", "---", "``", "''", *"\u2018\u2019\u201c\u201d\u2013\u2014\u2026"]
RARE += [*"\u00a3\u20ac\u00b0\u00bd\u00e9\u00d7\u00a0\u2022\u00ae\u2122\U0001f600"]


def awkward_caption(rng):
    """Words with punctuation where nobody would put it."""

    def mark():
        return rng.choice(COMMON if rng.random() < 0.7 else RARE)

    said = ""
    for _ in range(rng.randint(2, 9)):
        word = rng.choice(WORDS)
        said += rng.choice([word.capitalize(), word.upper(), *[word] * 14])
        marks = rng.choice([0, 0, 0, 1, 1, 2, 3])
        said += "".join(mark() for _ in range(marks))
        said += " " if not marks or rng.random() < 0.9 else ""
        said += mark() if rng.random() < 0.08 else ""
    return said


@pytest.mark.slow
def test_tokens_are_those_of_stanfords_program():
    package = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    rng = random.Random(0)
    captions = [awkward_caption(rng) for _ in range(20_000)]
    # The program looks at the line behind a caption that ends in "C." or "no."; so every other one is harmless.
    found = package.PTBTokenizer().tokenize({i: [{"caption": c}, {"caption": "x"}] for i, c in enumerate(captions)})
    differing = [(c, found[i][0], ours) for i, c in enumerate(captions) if found[i][0] != (ours := ptb_tokenize(c))]
    assert not differing, differing[:20]


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
        total, per_image = scorer.compute_score(
            {n: [" ".join(ptb_tokenize(c).split()) for c in content["references"][n]] for n in names},
            {n: [" ".join(ptb_tokenize(text).split())] for n, text in zip(names, said, strict=True)},
        )
    finally:
        for pipe in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
            pipe.close()
    assert found.total["METEOR"] == pytest.approx(total, rel=1e-9)
    assert found.per_sample["METEOR"] == pytest.approx(per_image, rel=1e-9)
    assert found.resampled(np.arange(20)) == found.total
