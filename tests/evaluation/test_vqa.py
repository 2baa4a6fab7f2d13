import json
from pathlib import Path

import pytest

from magma_jax.evaluation.metrics.by_protocol import METRICS
from magma_jax.evaluation.metrics.vqa import normalize_words, strip_punctuation, vizwiz_by_value, vqa_official

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/golden/metrics/vqa.json").read_text())
VARIANTS = ("vqa_official", "vqa_always_normalised", "vqa_before_2021")


def test_every_question_scores_as_the_official_program_says():
    questions = GOLDEN["questions"]
    scores = METRICS["vqa_official"]([q["prediction"] for q in questions], [q["answers"] for q in questions])
    assert [round(value, 2) for value in scores.per_sample["accuracy"]] == [q["official"] for q in questions]
    assert round(scores.total["accuracy"], 2) == GOLDEN["mean_official"]


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # Unanimous answers are not normalised by the official code, and only there.
        ("Yes.", ["yes"] * 10, (0, 100, 100)),
        ("the dog", ["dog"] * 10, (0, 100, 100)),
        ("two", ["2"] * 10, (0, 100, 100)),
        ("Yes", ["yes"] * 9 + ["no"], (100, 100, 100)),
        # Before 2021 the answers kept their articles and number words.
        ("two", ["two"] * 9 + ["3"], (100, 100, 0)),
        *[("red", ["red"] * k + ["blue"] * (10 - k), (score,) * 3) for k, score in enumerate([0, 30, 60, 90, 100])],
    ],
    ids=str,
)
def test_variants_differ_where_they_are_known_to(prediction, answers, expected):
    scores = [METRICS[name]([prediction], [answers]).total["accuracy"] for name in VARIANTS]
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(("k", "by_value"), [(1, 30), (2, 160 / 3), (3, 70), (4, 60), (10, 0)])
def test_vizwiz_by_value_drops_everyone_who_agrees(k, by_value):
    answers = ["x"] * k + [f"other {i}" for i in range(10 - k)]
    assert vizwiz_by_value("x", answers) == pytest.approx(by_value)
    assert METRICS["vizwiz_by_index"](["x"], [answers]).total["accuracy"] == pytest.approx(min(100, 30 * k))


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("a/b c /d", "ab c d"),
        ("1,000", "1000"),
        ("1,000 t-shirt", "1000 tshirt"),
        ("man,woman", "man woman"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("it's:", "it's:"),
        ("." * 40, "." * 8),
    ],
)
def test_punctuation(text, stripped):
    assert strip_punctuation(text) == stripped


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A man and THE dog", "man and dog"),
        ("none of Ten", "0 of 10"),
        ("dont know", "don't know"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("somebody'd 'ows'at", "somebodyd 'ow's'at"),
        ("Im Ive ill hell its", "im ive ill hell its"),
        ("yalld've y'alld've", "yalld've y'all'd've"),
        ("eleven", "eleven"),
    ],
)
def test_words(text, normal):
    assert normalize_words(text) == normal


def test_empty_predictions_and_few_answers_are_scored():
    assert vqa_official("", [""] * 10) == 100
    assert vqa_official("a", ["the"] * 4 + ["x"]) == pytest.approx(100)  # both are only articles
    assert vqa_official("yes", ["yes", "yes", "no"]) == pytest.approx(100 * (1 / 3 + 1 / 3 + 2 / 3) / 3)


def test_groups_have_their_own_means():
    scores = METRICS["vqa_official"](["a b", "x", "y"], [["a b"] * 10, ["x"] * 10, ["z"] * 10])
    assert scores.by_group(["one", "two", "two"]) == {"one": {"accuracy": 100}, "two": {"accuracy": 50}}
    with pytest.raises(ValueError, match="2 groups for 3 samples"):
        scores.by_group(["one", "two"])
