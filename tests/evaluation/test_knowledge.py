"""Questions that no caption answers: the data file, the prompts of every condition, and the figures."""

import dataclasses
import json
from collections import Counter
from importlib import resources

import jax
import numpy as np
import pytest

from magma_jax.data.openmoji import drawings
from magma_jax.evaluation.knowledge import measure
from magma_jax.evaluation.knowledge.questions import FILE, KnowledgeError, Question, questions
from magma_jax.evaluation.tasks.answering import Answerer
from tests import tiny

DATA = tiny.dataset()
CHOICES = tuple(tiny.COLOURS)
ASKED = [Question("colour", row, f"a {name} square", " It is", CHOICES, row) for row, name in enumerate(CHOICES)]


def test_the_questions_are_about_drawings_and_balanced():
    names = sorted(set(drawings._names().values()))
    every = frozenset(names)
    parsed = [drawings.parse_name(name, every) for name in names]
    flags = json.loads((resources.files("magma_jax") / FILE).read_text())["continent"]["answers"]
    flags = {name for found in flags.values() for name in found}
    records = [
        drawings.Drawing(i, "", name, *parts, split="train")
        for i, (name, parts) in enumerate(zip(names, parsed, strict=True))
    ]
    records = [dataclasses.replace(r, kind="flag") if r.base in flags else r for r in records]
    found = questions(records)
    assert len(found) >= 300
    for kind in {question.kind for question in found}:
        counts = Counter(q.answer for q in found if q.kind == kind)
        assert max(counts.values()) == min(counts.values()), kind
        assert len(counts) == len(next(q for q in found if q.kind == kind).choices)
    # No caption gives its answer away.
    assert not [q for q in found if q.choices[q.answer].lower() in q.name.lower().split()]
    assert next(q for q in found if q.kind == "capital").name == "the flag of France"
    with pytest.raises(KnowledgeError, match="no drawing of 'Algeria'"):
        questions([record for record in records if record.base != "Algeria"])


def test_a_constant_bias_is_calibrated_away():
    scores = [np.array([3.0, 0.0]), np.array([2.0, 0.5]), np.array([3.1, 0.2]), np.array([2.1, 0.4])]
    asked = [Question("a", 0, "", "", ("x", "y"), answer) for answer in (0, 1, 0, 1)]
    assert measure.right(asked, scores, calibrate=False).tolist() == [100, 0, 100, 0]
    assert measure.right(asked, scores, calibrate=True).tolist() == [100, 100, 100, 100]


def test_every_condition_asks_what_it_says(talkative, monkeypatch):
    monkeypatch.setattr(measure, "questions", lambda records: ASKED)
    asked = []
    original = Answerer.next_tokens

    def recorded(self, prompts, candidates):
        asked.append(prompts)
        return original(self, prompts, candidates)

    monkeypatch.setattr(Answerer, "next_tokens", recorded)
    found = measure.measure_knowledge(talkative, DATA, shots=2, batch_size=4)
    image, named, blind, shuffled = asked
    assert [prompt[-2:] for prompt in image] == [[row, " It is"] for row in range(4)]
    assert named[0][-1] == "A picture of a red square. It is"
    assert [prompt[-2] for prompt in blind] == [4] * 4
    assert all(prompt[-2] != row and prompt[-2] < 4 for row, prompt in enumerate(shuffled))
    for row, prompt in enumerate(image):
        shots = [prompt[:3], prompt[3:6]]
        assert all(shot[0] != row and shot[2] == f" {CHOICES[shot[0]]}.\n" for shot in shots)
        assert shots[0][0] != shots[1][0]
    assert (found["questions"], found["constant"], found["shots"]) == (4, 25, 2)
    assert set(found["conditions"]) == {"image", "named", "blind", "shuffled"}
    assert "4 questions, 2 shots; image above blind" in measure.table(found)


def test_scores_are_log_probabilities_of_the_next_token(talkative):
    prompts, candidates = [[0, " It is"], ["A picture"], [3, " It is a"]], [[5, 9, 7], [1, 2], [8, 4, 3]]
    scores = Answerer(talkative, DATA.images, batch_size=2).next_tokens(prompts, candidates)
    assert [len(row) for row in scores] == [3, 2, 3]
    logits = talkative(talkative.preprocess_inputs(["A picture"])).logits[0, -1]
    np.testing.assert_allclose(scores[1], jax.nn.log_softmax(logits)[np.array([1, 2])], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"choices": ("red", "red")}, {}, "two choices of colour begin with the same token"),
        ({}, {"shots": -1}, "shots must not be negative, got -1"),
    ],
)
def test_what_cannot_be_asked_is_said(talkative, monkeypatch, change, options, message):
    monkeypatch.setattr(measure, "questions", lambda records: [question._replace(**change) for question in ASKED])
    with pytest.raises(KnowledgeError, match=message):
        measure.measure_knowledge(talkative, DATA, **options)
