"""Prediction files in the official formats: joined by id, scored under a protocol's name."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from magma_jax.data.records import DataError
from magma_jax.evaluation import bootstrap
from magma_jax.evaluation.protocols import PROTOCOLS, stem
from magma_jax.evaluation.score import score_files


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
    assert result.constant["scores"]["accuracy"] < official


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
    (tmp_path / "p.jsonl").write_text('{"pairID": "a", "label": "neutral"}\n{"pairID": "c", "label": "neutral"}\n')
    result = score_files("accuracy", tmp_path / "r.jsonl", tmp_path / "p.jsonl", draws=1)
    assert result.samples == 2
    assert result.scores["accuracy"] == 50
    assert result.groups["label"]["entailment"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p[1:], "1 ids without a prediction, such as"),
        (
            lambda p: [*p, {"question_id": 9999, "answer": "x"}],
            "1 ids predicted that the references do not have, such as 9999",
        ),
        (lambda p: p + p[:1], "is predicted twice"),
        (lambda p: [{"question_id": 1}], "no answer"),
        (lambda p: [{"question_id": 1, "answer": 7}], "the prediction is a int, expected text"),
        (lambda p: {"answers": p}, "expected a list of predictions"),
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


def test_command_line(vqa):
    annotations, predictions, official = vqa
    command = [sys.executable, "-m", "magma_jax.evaluation", "score", "--protocol", "vqa_official", "--json"]
    command += ["--references", str(annotations), "--predictions", str(predictions), "--draws", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"]["accuracy"] == pytest.approx(official)
    done = subprocess.run([*command[:-1], "0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "magma_jax.evaluation: --draws must be at least 1, got 0"


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
