"""Prediction files in the official formats: joined by id, scored under a protocol's name."""

import json
import random
import re

import numpy as np
import pytest

from magma_jax.data.format.records import DataError
from magma_jax.evaluation.__main__ import main
from magma_jax.evaluation.metrics import bootstrap
from magma_jax.evaluation.scoring.protocols import PROTOCOLS, stem
from magma_jax.evaluation.scoring.score import score_files


def dump(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def vqa(golden, tmp_path):
    """The 400 golden questions as the official files, shuffled apart from each other."""
    questions = json.loads((golden / "metrics" / "vqa.json").read_text())["questions"]
    annotations = [
        {
            "question_id": q["question_id"],
            "image_id": q["question_id"] // 3,
            "question_type": f"type {q['question_id'] % 4}",
            "answer_type": "other" if q["question_id"] % 2 else "yes/no",
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(q["answers"], 1)
            ],
        }
        for q in questions
    ]
    predictions = [{"question_id": q["question_id"], "answer": q["prediction"]} for q in questions]
    random.Random(1).shuffle(annotations)
    random.Random(2).shuffle(predictions)
    files = dump(tmp_path / "annotations.json", {"annotations": annotations}), dump(tmp_path / "p.json", predictions)
    return *files, float(np.mean([q["official"] for q in questions]))


@pytest.fixture
def captions(golden, tmp_path):
    """The golden captions as COCO annotations and results."""
    content = json.loads((golden / "metrics" / "captions.json").read_text())
    annotations = [
        {"image_id": int(key), "id": 100 * int(key) + i, "caption": caption}
        for key, references in content["references"].items()
        for i, caption in enumerate(references)
    ]
    images = [
        {"id": int(key), "file_name": f"{key}.jpg", "domain": ("in", "near", "out")[int(key) % 3] + "-domain"}
        for key in content["references"]
    ]
    texts = {k: v[0] if isinstance(v, list) else v for k, v in content["hypotheses"].items()}
    results = [{"image_id": int(key), "caption": text} for key, text in texts.items()]
    random.Random(3).shuffle(annotations)
    random.Random(4).shuffle(results)
    references = dump(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    return references, dump(tmp_path / "results.json", results), content


def test_vqa_files_give_the_official_score_whatever_their_order(vqa):
    annotations, predictions, official = vqa
    result = score_files("vqa_official", annotations, predictions, draws=50)
    assert result.samples == 400
    assert result.scores["accuracy"] == pytest.approx(official, abs=1e-9)
    assert result.intervals["accuracy"].low < official < result.intervals["accuracy"].high
    assert {group: v["samples"] for group, v in result.groups["answer_type"].items()} == {"other": 200, "yes/no": 200}
    assert result.commonest["scores"]["accuracy"] < official


def test_caption_files_give_the_coco_and_the_nlgeval_score(captions):
    references, results, content = captions
    expected = content["coco_caption"]
    result = score_files("coco", references, results, draws=20)
    for name, value in result.scores.items():
        key = {"BLEU-1": "Bleu_1", "BLEU-4": "Bleu_4", "CIDEr": "CIDEr", "ROUGE-L": "ROUGE_L"}.get(name)
        if key in expected:
            assert value == pytest.approx(expected[key], rel=1e-3), name
            low, high = result.intervals[name]
            assert low < value < high, name
    raw = score_files("coco_nlgeval", references, results, draws=20)
    assert raw.scores["CIDEr"] != pytest.approx(result.scores["CIDEr"], rel=1e-2)
    assert "rarity in the whole set" in result.table()


def test_nocaps_scores_every_domain_with_its_own_rarities(captions):
    references, results, _ = captions
    result = score_files("nocaps", references, results, draws=5)
    domains = result.groups["domain"]
    assert sorted(domains) == ["in-domain", "near-domain", "out-domain"]
    mean = np.mean([values["CIDEr"] for values in domains.values()])
    assert result.scores["CIDEr"] != pytest.approx(mean, rel=1e-3)
    assert {"BLEU-4", "ROUGE-L"} <= domains["in-domain"].keys()


def test_nocaps_without_domains_is_an_error(captions, tmp_path):
    references, results, _ = captions
    content = json.loads(references.read_text())
    content["images"] = [{"id": image["id"]} for image in content["images"]]
    with pytest.raises(DataError, match="have no domain"):
        score_files("nocaps", dump(references, content), results)


def okvqa(tmp_path):
    answers = [
        {"answer": "race", "raw_answer": "racing", "answer_confidence": "yes", "answer_id": i} for i in range(10)
    ]
    annotations = [{"question_id": i, "image_id": i, "answers": answers, "answer_type": "other"} for i in range(3)]
    predictions = [{"question_id": i, "answer": a} for i, a in enumerate(["race", "racing", "races"])]
    return dump(tmp_path / "a.json", {"annotations": annotations}), dump(tmp_path / "p.json", predictions)


@pytest.mark.parametrize(("name", "right"), [("okvqa_answer", 1), ("okvqa_raw_answer", 1), ("okvqa_stemmed", 3)])
def test_okvqa_in_three_readings(tmp_path, name, right):
    files = okvqa(tmp_path)
    assert score_files(name, *files, draws=1).scores["accuracy"] == pytest.approx(100 * right / 3)


def test_stems_are_porters():
    assert stem("Racing ponies") == "race poni"


def test_gqa_counts_balanced_questions_by_string_equality(tmp_path):
    def question(answer, structural, balanced=True):
        return {"answer": answer, "isBalanced": balanced, "types": {"structural": structural, "semantic": "attr"}}

    questions = {"1": question("yes", "verify"), "2": question("left", "choose"), "3": question("dog", "query")}
    references = dump(tmp_path / "g.json", questions | {"4": question("no", "verify", balanced=False)})
    said = [("1", "yes"), ("2", "Left."), ("3", "cat")]
    predictions = dump(tmp_path / "p.json", [{"questionId": key, "prediction": text} for key, text in said])
    exact = score_files("gqa_exact", references, predictions, draws=1)
    assert exact.scores["accuracy"] == pytest.approx(100 / 3)
    assert exact.groups["form"]["binary"] == {"samples": 2, "accuracy": 50.0}
    assert score_files("gqa_relaxed", references, predictions, draws=1).scores["accuracy"] == pytest.approx(200 / 3)
    assert exact.left_out == 1
    # The same as a folder of chunks.
    (tmp_path / "chunks").mkdir()
    for i, key in enumerate("1234"):
        dump(tmp_path / f"chunks/chunk_{i}.json", {key: json.loads(references.read_text())[key]})
    assert score_files("gqa_exact", tmp_path / "chunks", predictions, draws=1) == exact
    dump(tmp_path / "chunks/chunk_9.json", {"1": question("yes", "verify")})
    with pytest.raises(DataError, match=r"chunk_9\.json"):
        score_files("gqa_exact", tmp_path / "chunks", predictions)


def test_gqa_has_measures_beside_accuracy(tmp_path):
    def question(answer, detailed="place", entailed=(), group=None, balanced=True):
        types = {"structural": "query", "detailed": detailed}
        return {
            "answer": answer,
            "isBalanced": balanced,
            "types": types,
            "entailed": list(entailed),
            "groups": {"global": group},
        }

    questions = {
        "1": question("dog", entailed=["1", "4", "5"], group="animal"),
        "2": question("cat", group="animal"),
        "3": question("color", detailed="twoCommon"),
        "4": question("yes", balanced=False),
        "5": question("no", balanced=False),
    }
    choices = {key: {"valid": ["dog", "cat", "pond"], "plausible": ["dog", "cat"]} for key in questions}
    references, choices = dump(tmp_path / "g.json", questions), dump(tmp_path / "c.json", choices)

    def predicted(**said):
        entries = [{"questionId": key[1:], "prediction": text} for key, text in said.items()]
        path = dump(tmp_path / "p.json", entries)
        return score_files("gqa_exact", references, path, choices=choices, draws=1)

    result = predicted(_1="dog", _2="pond", _3="shape", _4="yes", _5="yes")
    assert result.samples == 3
    assert result.measures["consistency"] == 50
    assert result.measures["validity"] == 100
    assert result.measures["plausibility"] == pytest.approx(200 / 3)
    # One dog, as it should be; no cat where there should be one.
    assert result.measures["distribution"] == pytest.approx(1 / 100)
    assert "consistency: 50" in result.table()
    # What follows was not asked.
    assert "consistency" not in predicted(_1="dog", _2="cat", _3="shape", _4="yes").measures
    with pytest.raises(DataError, match="1 ids predicted that the references do not have"):
        predicted(_1="dog", _2="cat", _3="shape", _6="yes")
    with pytest.raises(DataError, match="1 ids without a prediction"):
        predicted(_1="dog", _2="cat")


def test_vizwiz_by_index_and_by_value(tmp_path):
    answers = [{"answer": "coke", "answer_confidence": "yes"}] * 10
    references = [{"image": "VizWiz_val_00000000.jpg", "question": "?", "answers": answers, "answer_type": "other"}]
    predictions = dump(tmp_path / "p.json", [{"image": "VizWiz_val_00000000.jpg", "answer": "coke"}])
    references = dump(tmp_path / "v.json", references)
    assert score_files("vizwiz_by_index", references, predictions, draws=1).scores["accuracy"] == 100
    assert score_files("vizwiz_by_value", references, predictions, draws=1).scores["accuracy"] == 0


def test_entailment_without_majority_is_not_counted(tmp_path):
    labels = [("a", "neutral"), ("b", "-"), ("c", "entailment")]
    lines = [json.dumps({"pairID": key, "gold_label": label}) + "\n" for key, label in labels]
    (tmp_path / "r.jsonl").write_text("".join(lines))
    for predicted in ("ac", "abc"):
        said = [json.dumps({"pairID": key, "label": "neutral"}) + "\n" for key in predicted]
        (tmp_path / "p.jsonl").write_text("".join(said))
        result = score_files("accuracy", tmp_path / "r.jsonl", tmp_path / "p.jsonl", draws=1)
        assert (result.samples, result.left_out) == (2, 1)
        assert result.scores["accuracy"] == 50
        assert result.groups["label"]["entailment"]["accuracy"] == 0
    assert "2 samples, 1 left out" in result.table()
    (tmp_path / "r.jsonl").write_text(lines[1])
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match="nothing to score"):
        score_files("accuracy", tmp_path / "r.jsonl", tmp_path / "p.jsonl")


def test_labels_may_be_numbers(tmp_path):
    """As Hateful Memes has them."""
    (tmp_path / "r.jsonl").write_text('{"id": 42953, "label": 0}\n{"id": "01235", "label": 1}\n')
    predictions = dump(tmp_path / "p.json", [{"id": 42953, "label": 0}, {"id": "01235", "label": "0"}])
    assert score_files("accuracy", tmp_path / "r.jsonl", predictions, draws=1).scores["accuracy"] == 50
    with pytest.raises(DataError, match="entry 1: 'label' is null"):
        score_files("accuracy", tmp_path / "r.jsonl", dump(predictions, [{"id": 42953, "label": None}]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p[1:], "1 ids without a prediction, such as"),
        (
            lambda p: [*p, {"question_id": 9999, "answer": "x"}],
            "1 ids predicted that the references do not have, such as 9999",
        ),
        (lambda p: p + p[:1], "is predicted twice"),
        (lambda p: [{"question_id": 1}], "p.json: entry 1: no 'answer'"),
        (lambda p: [{"question_id": 1, "answer": 7}], "entry 1: 'answer' is a number, not text"),
        (lambda p: {"answers": p}, "p.json is an object, not a list"),
        (lambda p: [[1, "yes"]], "entry 1 is a list, not an object"),
        (lambda p: [{"question_id": None, "answer": "yes"}], "entry 1: 'question_id' is null, not"),
    ],
)
def test_wrong_prediction_files_are_one_line(vqa, change, says):
    annotations, predictions, _ = vqa
    dump(predictions, change(json.loads(predictions.read_text())))
    with pytest.raises(DataError, match=says) as error:
        score_files("vqa_official", annotations, predictions)
    assert "\n" not in str(error.value)


def test_empty_answers_and_double_annotations_are_errors(vqa):
    annotations, predictions, _ = vqa
    content = json.loads(annotations.read_text())
    dump(annotations, {"annotations": content["annotations"] * 2})
    with pytest.raises(DataError, match="is annotated twice"):
        score_files("vqa_official", annotations, predictions)
    content["annotations"][0]["answers"] = []
    dump(annotations, content)
    with pytest.raises(DataError, match="has no answers"):
        score_files("vqa_official", annotations, predictions)


@pytest.mark.parametrize(
    ("protocol", "content", "says"),
    [
        ("vqa_official", [], "r.json: no 'annotations' \\(there is: a list\\)"),
        ("vqa_official", {"annotations": {"1": 2}}, "r.json: 'annotations' is an object, not a list"),
        ("vqa_official", {"annotations": [7]}, "r.json: entry 1: no 'question_id' \\(there is: a number"),
        ("vqa_official", {"annotations": [{"question_id": 1, "answers": "yes"}]}, "question 1: 'answers' is text"),
        (
            "vqa_official",
            {"annotations": [{"question_id": 1, "answers": [{"answer": 2}]}]},
            "question 1: 'answer' is a",
        ),
        ("vizwiz_by_index", {"a": 1}, "r.json is an object, not a list"),
        ("vizwiz_by_index", [{"image": 3}], "entry 1: 'image' is a number, not text"),
        ("gqa_exact", ["1"], "r.json is a list, not an object"),
        ("gqa_exact", {"1": "yes"}, "question 1"),
        ("gqa_exact", {"1": {"answer": "yes", "types": "query"}}, "question 1: 'types' is text, not an object"),
        ("gqa_exact", {"1": {"answer": ["yes"]}}, "question 1: 'answer' is a list, not text"),
        ("coco", {"annotations": [{"image_id": 1, "caption": None}]}, "annotation 1: 'caption' is null, not text"),
        ("nocaps", {"annotations": [{"image_id": 1, "caption": "a"}], "images": "no"}, "'images' is text, not a list"),
        ("accuracy", [], "line 1 is a list, not an object"),
        ("accuracy", {"id": 1, "label": ["a"]}, "entry 1: 'label' is a list"),
    ],
)
def test_references_of_odd_types_are_one_line_with_file_and_record(tmp_path, protocol, content, says):
    references, predictions = dump(tmp_path / "r.json", content), dump(tmp_path / "p.json", [])
    with pytest.raises(DataError, match=says) as error:
        score_files(protocol, references, predictions)
    assert str(references) in str(error.value)
    assert "\n" not in str(error.value)


def test_command_line(vqa, capsys):
    annotations, predictions, official = vqa
    command = ["score", "--protocol", "vqa_official", "--references", str(annotations), "--predictions"]

    def run(*options):
        return main([*command, *options])

    run(str(predictions), "--draws", "10", "--json")
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] == pytest.approx(official)
    run(str(predictions), "--draws", "10")
    assert capsys.readouterr().out.startswith("vqa_official, 400 samples\n")
    assert run(str(predictions), "--draws", "0") == 2
    assert capsys.readouterr().err == "magma_jax.evaluation: --draws must be at least 1, got 0\n"
    assert run("nowhere.json") == 2
    assert re.fullmatch(r"magma_jax.evaluation: .*: no such file.*\n", capsys.readouterr().err)


def test_every_protocol_names_a_metric():
    assert all(callable(protocol.judge) for protocol in PROTOCOLS.values())


# The bootstrap


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = rng.normal(3.0, 1.0, 80)
        found = bootstrap.intervals(lambda rows, v=values: {"mean": float(v[rows].mean())}, 80, draws=200)
        covered += found["mean"].low <= 3.0 <= found["mean"].high
    assert 85 <= covered <= 100


def test_a_paired_comparison_sees_what_unpaired_noise_hides():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 200)
    first, second = hard + rng.normal(0, 0.1, 200), hard + 0.1 + rng.normal(0, 0.1, 200)

    def mean_of(values):
        return lambda rows: {"score": float(values[rows].mean())}

    found = bootstrap.compare(mean_of(first), mean_of(second), 200)["score"]
    assert found.interval.low > 0
    assert found.p < 0.01
    same = bootstrap.compare(mean_of(first), mean_of(first), 200)["score"]
    assert (same.difference, same.p) == (0.0, 1.0)
