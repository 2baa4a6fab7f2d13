"""Two results on the same examples, and one task under many settings."""

import dataclasses
import json

import pytest

from magma_jax.data.records import DataError
from magma_jax.evaluation.comparison import compare_results, table, to_json
from magma_jax.evaluation.sweep import combinations, run_sweep, sweep_table, write_sweep
from magma_jax.evaluation.task_files import write_result
from magma_jax.evaluation.tasks import TASKS
from tests.evaluation.test_task_files import result_of

RIGHT, WRONG = [" yes", " red"], [" no", " red"]


@pytest.fixture
def two(folders, talkative, tmp_path):
    """Result files of two systems: one answers everything, the other half of it."""
    for name, outputs in (("a", WRONG), ("b", RIGHT)):
        write_result(tmp_path / name, result_of(folders, talkative, outputs))
    return tmp_path


def test_the_better_of_two_is_told_with_an_interval(two):
    found = compare_results(two / "a", two / "b", draws=200)["vqav2-0shot"]["vqa_official"]["accuracy"]
    assert found.difference == 50
    assert 0 < found.interval.low < 50 < found.interval.high
    assert found.p < 0.05
    same = compare_results(two / "a/vqav2-0shot.json", two / "a/vqav2-0shot.json", draws=50)
    assert same["vqav2-0shot"]["vqa_official"]["accuracy"].difference == 0
    text = table("a", "b", same)
    assert "vqav2-0shot  vqa_official  accuracy" in text
    json.dumps(to_json(same))


def test_the_order_of_predictions_does_not_matter(two):
    path = two / "b/vqav2-0shot.predictions.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    found = compare_results(two / "a", two / "b", draws=50)["vqav2-0shot"]["vqa_official"]["accuracy"]
    assert found.difference == 50


def test_what_cannot_be_compared_is_refused(two):
    (two / "empty").mkdir()
    with pytest.raises(DataError, match="no result of the same name"):
        compare_results(two / "a", two / "empty")
    path = two / "b/vqav2-0shot.predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="not about the same examples; only one has 0"):
        compare_results(two / "a", two / "b")
    path.write_text("".join([lines[0].replace('"yes"', '"maybe"'), *lines[1:]]))
    with pytest.raises(DataError, match="other true answers to 0"):
        compare_results(two / "a", two / "b")


def test_a_sweep_asks_once_for_all_that_is_only_judged_differently(folders, talkative, tmp_path):
    task = dataclasses.replace(TASKS["vqav2"], data="x")
    tasks = combinations(task, {"prompt": ["Q: {} A:", "'{}'"], "truncation": ["words", "newline"]})
    assert [(t.prompt, t.truncation) for t in tasks[:2]] == [("Q: {} A:", "words"), ("Q: {} A:", "newline")]
    asked = []

    def evaluate(task):
        asked.append(task)
        return dataclasses.replace(result_of(folders, talkative, [" yes and\nQ:", " red"]), task=task)

    results = run_sweep(tasks, evaluate, talkative.tokenizer)
    assert [task.prompt for task in asked] == ["Q: {} A:", "{}"]
    assert [result.task for result in results] == tasks
    assert [r.scores["vqa_official"].scores["accuracy"] for r in results] == [100, 50, 100, 50]
    assert not results[1].first_line
    text = sweep_table(results, ["prompt", "truncation"])
    assert text.splitlines()[0].split()[:2] == ["prompt", "truncation"]
    assert len(text.splitlines()) == 5
    path = write_sweep(tmp_path, results, ["prompt", "truncation"])
    assert path.read_text() == text + "\n"
    with pytest.raises(ValueError, match="unknown key --sweep"):
        combinations(task, {"promt": ["a"]})
    with pytest.raises(ValueError, match="needs one"):
        combinations(task, {"prompt": ["a"]})
