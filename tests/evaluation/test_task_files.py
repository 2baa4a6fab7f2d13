"""What a task leaves: results, predictions, a page, and the card of a checkpoint; the paper's figures."""

import dataclasses
import json
import os

import pytest

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.report.gallery import write_gallery
from magma_jax.evaluation.report.paper import FIGURES
from magma_jax.evaluation.report.results_card import write_card
from magma_jax.evaluation.report.submissions import write_submission
from magma_jax.evaluation.report.task_files import predictions_file, read_answers, write_result
from magma_jax.evaluation.results.columns import Column
from magma_jax.evaluation.scoring import protocols
from magma_jax.evaluation.tasks.examples import StoredExamples
from magma_jax.evaluation.tasks.few_shot import finish
from magma_jax.evaluation.tasks.task import TASKS
from tests.evaluation.test_report import Page

CHECKPOINT = {"name": "mine", "step": 3}


def result_of(folders, model, outputs, name="vqav2", **changes):
    """A result whose outputs are given; no model is run."""
    task = dataclasses.replace(TASKS[name], data=str(folders / "val"), **changes)
    queries = StoredExamples(folders / "val", task.kind, 64)
    stamp = {
        "samples": len(queries),
        "of": len(queries),
        "data": queries.name,
        "shots": None,
        "longest_prompt": 9,
        "context": 64,
        "decoding": "greedy",
        "checkpoint": CHECKPOINT,
    }
    texts = [outputs[i % len(outputs)] for i in range(len(queries))]
    return finish(task, model.tokenizer, list(queries), [[] for _ in texts], texts, queries.images, stamp)


@pytest.fixture
def written(folders, talkative, tmp_path):
    """Questions of which the first kind is right and the second right for three of ten annotators, then wrong."""
    result = result_of(folders, talkative, [" yes\nQ: <b>", " dark blue", " yes", " green"])
    return write_result(tmp_path, result), write_result(tmp_path, result_of(folders, talkative, ["a square"], "coco"))


def test_every_prediction_is_kept_whole_and_cut(written):
    lines = [json.loads(line) for line in predictions_file(written[0]).read_text().splitlines()]
    assert len(lines) == 12
    assert lines[0]["output"] == " yes\nQ: <b>"
    assert lines[0]["answer"] == "yes"
    assert [line["scores"]["accuracy"] for line in lines[:4]] == [100, 100, 100, 0]
    examples, answers = read_answers(written[0])
    assert (examples[1].id, examples[1].groups, answers[1]) == ("1", {"answer_type": "other"}, "dark blue")


def test_the_card_has_the_tables_of_the_paper_and_the_stamp(written):
    folder = written[0].parent
    path = write_card(folder, CHECKPOINT)
    text = path.read_text()
    row = {line[:15].strip(): line.split() for line in text.splitlines()}
    assert row["this model"][-1] != "-"
    assert "61.5" in text
    assert "57.0" in text
    assert "68.0" in text  # finetuned, table 2
    assert "no adapters" in text
    assert "protocol    vqa_official\n" in text
    assert "also        vqa_before_2021: accuracy 75 (" in text
    assert "checkpoint  name mine, step 3" in text
    card = json.loads(path.with_suffix(".json").read_text())
    assert {"task": "vqav2", "shots": 0, "metric": "accuracy", "group": "", "value": 75.0} in card["rows"]["this model"]
    # Other checkpoints and other settings have cards of their own.
    assert "no scores" in write_card(folder, {"name": "other"}).read_text()
    assert write_card(folder, CHECKPOINT) == path
    assert path.read_text() == text


def test_nothing_but_the_same_evaluation_replaces_a_file(folders, talkative, tmp_path):
    """Settings that a file name cannot show, other data and another checkpoint: every result has its own files."""
    result = result_of(folders, talkative, [" yes"])
    prompts = ["Q: {} A:", "Q? {} A:", "Q: {} " + "word " * 60 + "A:", "Q: {} " + "word " * 60 + "B:"]
    tasks = [dataclasses.replace(result.task, prompt=prompt) for prompt in prompts]
    tasks += [dataclasses.replace(result.task, data="elsewhere"), dataclasses.replace(result.task, shot_data="x")]
    results = [dataclasses.replace(result, task=task) for task in tasks]
    results.append(dataclasses.replace(result, stamp=result.stamp | {"checkpoint": {"name": "mine", "step": 4}}))
    paths = [write_result(tmp_path, one) for one in results]
    assert len(set(paths)) == len(results)
    assert all(len(os.fsencode(path.name)) < 200 for path in paths)
    assert [write_result(tmp_path, one) for one in results] == paths
    assert paths[0].name.startswith("vqav2-0shot-")
    cards = {write_card(tmp_path, one.stamp["checkpoint"], one.task.settings) for one in results}
    assert len(cards) == 5  # four prompts, and another checkpoint
    # Of two results of a task with other data the newest stands in the card.
    os.utime(paths[0], ns=(2**62, 2**62))
    assert str(folders / "val") in write_card(tmp_path, CHECKPOINT).read_text()


def test_the_first_line_is_scored_too_where_the_truth_cut_the_answer(folders, talkative):
    result = result_of(folders, talkative, ["yes and\nQ:"])
    assert result.scores["vqa_official"].scores["accuracy"] == 50
    assert result.first_line["vqa_official"].scores["accuracy"] == 0
    assert not result_of(folders, talkative, ["yes"]).first_line


@pytest.mark.parametrize("name", ["vqav2", "coco"])
def test_the_page_is_whole_and_needs_nothing_else(folders, talkative, tmp_path, name):
    result = result_of(folders, talkative, [" <b>yes</b>\nQ: &", " dark blue", "a square"], name)
    write_gallery(tmp_path / "page.html", result, shown=5)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert len(page.all("article")) == 5
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert "http" not in text.replace("https://openmoji", "")
    assert "<b>yes" not in text
    words = "".join(page.text)
    assert "5 are shown, evenly spaced" in words
    marks = {attributes["class"].split()[-1] for attributes in page.all("article")}
    assert marks <= {"right", "partly", "wrong"}
    assert len(marks) > 1


def test_submissions_are_what_the_official_formats_take(folders, talkative, tmp_path):
    result = result_of(folders, talkative, [" yes", " red"])
    write_result(tmp_path, result)
    (submission,) = tmp_path.glob("vqav2-0shot-*.submission.json")
    entries = json.loads(submission.read_text())
    assert entries[:2] == [{"question_id": 0, "answer": "yes"}, {"question_id": 1, "answer": "red"}]
    example = dataclasses.replace(result.examples[0], id="12")
    expected = {
        "okvqa": {"question_id": 12, "answer": "x"},
        "gqa": {"questionId": "12", "prediction": "x"},
        "vizwiz": {"image": "12.jpg", "answer": "x"},
        "nocaps": {"image_id": 12, "caption": "x"},
        "coco": {"image_id": 12, "caption": "x"},
    }
    for task, entry in expected.items():
        write_submission(tmp_path / "s.json", task, [example], ["x"])
        assert json.loads((tmp_path / "s.json").read_text()) == [entry]
        read = protocols.read_predictions(tmp_path / "s.json", protocols.PROTOCOLS[TASKS[task].protocols[0]])
        assert list(read.values()) == ["x"]
    with pytest.raises(DataError, match="nocaps wants whole numbers"):
        write_submission(tmp_path / "s.json", "nocaps", [dataclasses.replace(example, id="a")], ["x"])


def test_results_with_other_ids_than_the_benchmarks_are_kept_without_a_submission(folders, talkative, tmp_path, capsys):
    result = result_of(folders, talkative, [" yes"])
    named = [dataclasses.replace(example, id=f"test-{example.id}") for example in result.examples]
    path = write_result(tmp_path, dataclasses.replace(result, examples=named))
    assert len(read_answers(path)[0]) == 12
    assert not list(tmp_path.glob("*.submission.json"))
    assert "no submission: " in capsys.readouterr().err


def test_secret_answers_are_asked_and_not_scored(folders, talkative, tmp_path):
    result = result_of(folders, talkative, ["yes"])
    secret = [dataclasses.replace(example, answers=()) for example in result.examples]
    mixed = [*secret[:2], *result.examples[2:]]
    with pytest.raises(DataError, match="2 of 12 examples have no true answers, such as 0"):
        finish(result.task, talkative.tokenizer, mixed, result.shots, result.outputs, result.images, result.stamp)
    result = finish(result.task, talkative.tokenizer, secret, result.shots, result.outputs, result.images, result.stamp)
    path = write_result(tmp_path, result)
    assert not result.scores
    assert "secret" in write_card(tmp_path, CHECKPOINT).read_text()
    assert json.loads(predictions_file(path).read_text().splitlines()[0])["scores"] == {}


def test_the_papers_figures_stand_in_their_columns():
    long, rn50x4 = FIGURES["MAGMA long"], FIGURES["CLIP RN50x4"]
    assert long[Column("vqav2", 0, "accuracy")] == 61.5
    assert long[Column("nocaps", 0, "CIDEr", "out-domain")] == 62.0
    assert long[Column("nocaps", 0, "BLEU-4", "all")] == 12.3
    assert long[Column("coco", 0, "BLEU-4")] == 17.6
    assert rn50x4[Column("vizwiz", 4, "accuracy")] == 8.3
    assert FIGURES["Frozen, rebuilt"][Column("gqa", 1, "accuracy")] == 23.5
    assert FIGURES["finetuned (Table 2)"][Column("snli_ve", 0, "accuracy")] == 79.0
    assert len(FIGURES) == 16
