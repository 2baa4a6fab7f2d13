"""Two results on the same examples, and one task under many settings."""

import dataclasses
import json

import pytest

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.report.comparison import compare_results
from magma_jax.evaluation.report.comparison_page import write_comparison
from magma_jax.evaluation.report.task_files import predictions_file, write_result
from magma_jax.evaluation.tasks.sweep import combinations, run_sweep, sweep_table, write_sweep
from magma_jax.evaluation.tasks.task import TASKS
from tests.evaluation.test_task_files import result_of

RIGHT, WRONG = [" yes", " red"], [" no", " red"]


@pytest.fixture
def two(folders, talkative, tmp_path):
    """Results of two systems: one answers half, the other everything."""
    return [
        write_result(tmp_path / name, result_of(folders, talkative, outputs))
        for name, outputs in (("a", WRONG), ("b", RIGHT))
    ]


def accuracy_of(systems, **options):
    return compare_results(systems, **options).scores["vqav2, 0 shots"]["vqa_official"]["accuracy"]


def test_the_better_of_two_is_told_with_an_interval(two):
    a, b = accuracy_of([two[0].parent, two[1].parent], draws=200)
    assert (a.score, b.score, a.less_first) == (50, 100, None)
    assert b.less_first.difference == 50
    assert 0 < b.less_first.interval.low < 50 < b.less_first.interval.high
    assert b.less_first.p < 0.05
    same = compare_results([two[0], two[0]], draws=50)
    assert accuracy_of([two[0], two[0]], draws=50)[1].less_first.difference == 0
    text = same.table()
    assert text.splitlines()[4].split()[:7] == ["vqav2,", "0", "shots", "vqa_official", "accuracy", "50", "50"]
    json.dumps(same.to_json())


def test_any_number_is_compared_in_one_table_and_one_page(two, folders, talkative, tmp_path):
    third = write_result(tmp_path / "c", result_of(folders, talkative, [" <b>", " red"]))
    found = compare_results([*two, third], draws=50)
    heading, row = (line.split() for line in found.table().splitlines()[4:6])
    assert " ".join(heading) == "protocol metric A B C B less A 95 % interval p C less A 95 % interval p"
    assert row[4:8] == ["accuracy", "50", "100", "50"]
    assert "tests about 1 fall below" in found.table()
    write_comparison(tmp_path / "new/page.html", found)
    text = (tmp_path / "new/page.html").read_text()
    assert "6 of 12 examples have different scores" in text
    assert "&lt;b&gt; (0)" in text
    assert "<b>A</b>" in text
    with pytest.raises(DataError, match="takes 2 to 26 results, got 1"):
        compare_results(two[:1])


def test_what_one_lacks_is_named_by_its_command(two, folders, talkative, tmp_path):
    write_result(two[0].parent, result_of(folders, talkative, RIGHT, limit=4))
    systems = [path.parent for path in two]
    (systems[1] / "model.json").write_text("{}")
    (missing,) = compare_results(systems, draws=50).missing
    assert missing.startswith(f"python eval.py --workdir {systems[1]} --task vqav2 --shots 0 --data ")
    assert missing.endswith(" --set limit=4")
    assert missing in compare_results(systems, draws=50).table()
    empty = [tmp_path / "x", tmp_path / "y"]
    for folder in empty:
        folder.mkdir()
        (folder / "model.json").write_text("{}")
    with pytest.raises(DataError, match=r"shots and settings: python eval.py --workdir .*/x --task own_quest"):
        compare_results(empty)
    with pytest.raises(DataError, match="/no: no such folder"):
        compare_results([tmp_path / "no", two[0]])


def test_the_order_of_predictions_does_not_matter(two):
    path = predictions_file(two[1])
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert accuracy_of(two, draws=50)[1].less_first.difference == 50


def test_what_cannot_be_compared_is_refused(two):
    folders = two[0].parent, two[1].parent
    (folders[0] / "empty").mkdir()
    with pytest.raises(DataError, match="no results of the same task"):
        compare_results([folders[0], folders[0] / "empty"])
    (folders[0] / "again.results.json").write_text(two[0].read_text())
    with pytest.raises(DataError, match="several results of vqav2, 0 shots"):
        compare_results(folders)
    two[0].write_text("[]")
    with pytest.raises(DataError, match="no result of eval"):
        compare_results(two)
    two[0].write_text(two[1].read_text().replace('"commonest"', '"constant"'))
    with pytest.raises(DataError, match="by another version; evaluate again"):
        compare_results(two)
    two[0].write_text(two[1].read_text())
    path = predictions_file(two[1])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="not about the same examples; only one has 0"):
        compare_results(two)
    path.write_text("".join([lines[0].replace('"yes"', '"maybe"'), *lines[1:]]))
    with pytest.raises(DataError, match="other true answers to 0"):
        compare_results(two)


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
    with pytest.raises(ValueError, match="--sweep shots: give its values too"):
        combinations(task, {"shots": []})
    assert [t.prompt for t in combinations(task, {"prompt": ["{}", "Is {} so?"]})] == ["{}", "Is {} so?"]
    warm = combinations(task, {"sampling.temperature": ["0.0", "0.5"]})
    results = [dataclasses.replace(results[0], task=one) for one in warm]
    assert [line.split()[0] for line in sweep_table(results, ["sampling.temperature"]).splitlines()[1:]] == [
        "0.0",
        "0.5",
    ]
    assert write_sweep(tmp_path, results[:1], ["truncation"]) != write_sweep(tmp_path, results[1:], ["truncation"])
