"""Evaluation of a model on a split: conditions, figures, files."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.convert.changes.quantize import quantize_folder
from magma_jax.data.openmoji.drawings import Sample
from magma_jax.evaluation import own_split
from magma_jax.evaluation.metrics.baselines import most_frequent_answers, shuffle_images
from magma_jax.evaluation.results.results import CONDITIONS
from magma_jax.evaluation.tasks import batched_generate as programs
from magma_jax.families import open_token_generator
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from magma_jax.training.run import setup
from magma_jax.training.step.optim import Group
from tests import tiny

DATA = tiny.dataset()


@pytest.fixture(scope="module")
def model():
    return Magma(tiny.MODEL, split(MagmaModel(tiny.MODEL, rngs=nnx.Rngs(0)))[1], DATA.tokenizer)


@pytest.fixture(scope="module")
def evaluation(model):
    return own_split.evaluate(model, DATA, batch_size=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that learned the four colours; here the language model learns too."""
    config = tiny.run_config(steps=120, batch_size=8, log_every=20, checkpoint_every=120)
    optim = dataclasses.replace(config.optim, groups=config.optim.groups | {"language": Group()})
    workdir = tmp_path_factory.mktemp("runs") / "colours"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_dataset", lambda config: DATA)
        tiny.train(dataclasses.replace(config, optim=optim), workdir)
    return workdir


@pytest.fixture
def squares(monkeypatch):
    monkeypatch.setattr(own_split, "load_dataset", lambda config: DATA)


def with_test_split(*samples):
    return dataclasses.replace(DATA, evaluation={"train": DATA.evaluation["train"], "test": list(samples)})


def test_a_model_that_learned_to_see_beats_its_baselines(finished, squares, capsys, tmp_path):
    evaluation = own_split.evaluate_run(open_token_generator, finished, overview=tmp_path / "overview.png")
    figures = evaluation.figures
    assert figures["caption_exact"] == figures["vqa_accuracy"] == 100
    assert figures["rouge_l"] == pytest.approx(1)
    assert figures["blind"]["vqa_accuracy"] <= 25
    assert figures["shuffled"]["caption_exact"] == figures["shuffled"]["vqa_accuracy"] == 0
    assert figures["constant"]["vqa_accuracy"] == 25
    # Shown another square, it names that square's colour.
    colours = list(tiny.COLOURS)
    for i, sample in enumerate(evaluation.samples):
        if sample.kind == "colour":
            assert evaluation.predictions["shuffled"][i] == colours[evaluation.shuffled_images[i]]

    assert json.loads((finished / "results.json").read_text()) == figures
    assert figures["protocol"]["checkpoint_step"] == 120
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == list(evaluation.predictions["model"])
    assert lines[0].keys() == {"picture", "kind", "prompt", "truth", *CONDITIONS, "shuffled_picture"}
    assert (finished / "report.html").stat().st_size > 5000
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob(".*.partial"))
    printed = capsys.readouterr().out
    assert "test split, 4 captions, 4 questions, step 120" in printed
    model_row = next(line for line in printed.splitlines() if line.startswith("model"))
    # Three words have no 4-gram: BLEU-4 is left out, and CIDEr, a mean over four orders, is 7.5.
    assert model_row.split()[1:] == ["100.0", "-", "7.50", "1.000", "100.0"]
    assert "BLEU-4 is left out" in printed


def test_another_split_or_a_limit_leaves_the_full_results_alone(finished, squares):
    own_split.evaluate_run(open_token_generator, finished, "train", 2)
    (path,) = finished.glob("results-split=train-limit=2-*.json")
    assert json.loads(path.read_text())["protocol"]["captions"] == 2
    assert (finished / path.name.replace("results", "report").replace(".json", ".html")).exists()


@pytest.mark.slow
def test_what_was_made_of_a_run_is_evaluated_like_the_run(finished, squares, tmp_path):
    quantize_folder(finished, tmp_path / "int8", "int8")
    figures = own_split.evaluate_run(open_token_generator, tmp_path / "int8").figures
    assert figures["caption_exact"] == figures["vqa_accuracy"] == 100
    assert "checkpoint_step" not in figures["protocol"]
    assert (tmp_path / "int8" / "report.html").exists()


def test_the_same_evaluation_twice_is_the_same(model, evaluation):
    again = own_split.evaluate(model, DATA, batch_size=3, max_new_tokens=6)
    assert again.figures == evaluation.figures
    assert again.predictions == evaluation.predictions


def test_batch_size_changes_no_prediction(model, evaluation):
    other = own_split.evaluate(model, DATA, batch_size=1, max_new_tokens=6)
    assert other.predictions == evaluation.predictions


def test_one_program_a_bucket(model):
    programs.answer_batch.clear_cache()
    own_split.evaluate(model, DATA, batch_size=2, max_new_tokens=5)
    lengths = {4 + len(DATA.tokenizer.encode(sample.prompt)) for sample in DATA.evaluation["test"]}
    assert programs.answer_batch._cache_size() == len({-(-length // 16) for length in lengths})


def test_every_condition_has_every_figure(evaluation):
    names = {"caption_exact", "bleu4", "cider", "rouge_l", "vqa_accuracy", "vqa_by_kind"}
    figures = evaluation.figures
    assert set(figures) == names | {"blind", "shuffled", "constant", "protocol"}
    assert all(set(figures[condition]) == names for condition in CONDITIONS[1:])
    assert set(figures["vqa_by_kind"]) == {"colour"}
    json.dumps(figures)


def test_predictions_equal_those_of_the_interface(model, evaluation):
    for sample, text in zip(evaluation.samples, evaluation.predictions["model"], strict=True):
        image = model.embed_features(model.encode_images(DATA.images[[sample.image]]))
        words = model.embed_tokens(model.tokenizer.encode(sample.prompt))[None]
        embeddings = jnp.concatenate([image, words], axis=1)
        assert model.generate(embeddings, max_steps=6, temperature=0.0)[0].strip() == text


@pytest.mark.parametrize("seed", range(20))
def test_shuffled_samples_never_keep_their_image(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["caption", "a", "b", "b", "b"], 40).tolist()
    images = rng.integers(0, rng.integers(2, 30), 40).tolist()
    images[:2] = [0, 1]
    samples = [Sample(image, "p", "a", kind) for image, kind in zip(images, kinds, strict=True)]
    samples.append(Sample(0, "p", "a", "alone in its kind"))
    shown = shuffle_images(samples, seed)
    assert all(other != sample.image for other, sample in zip(shown, samples, strict=True))
    assert shown == shuffle_images(samples, seed)
    # Where no image dominates its kind, the kind's images change places among themselves.
    for kind in set(kinds):
        own = [sample.image for sample in samples if sample.kind == kind]
        if 2 * max(Counter(own).values()) <= len(own):
            others = [o for o, sample in zip(shown, samples, strict=True) if sample.kind == kind]
            assert sorted(others) == sorted(own)


def test_the_constant_answer_is_the_commonest_to_the_prompt_then_of_the_kind():
    training = [
        Sample(0, "Q: x? A:", " no", "yn"),
        Sample(1, "Q: x? A:", " no", "yn"),
        *[Sample(i, "Q: y? A:", " yes", "yn") for i in range(3)],
        Sample(3, "A picture of", " b", "caption"),
        Sample(4, "A picture of", " a", "caption"),
    ]
    asked = [
        Sample(9, "Q: x? A:", " yes", "yn"),
        Sample(9, "Q: z? A:", " no", "yn"),
        Sample(9, "A picture of", " c", "caption"),
        Sample(9, "Q: w? A:", " c", "other"),
    ]
    assert most_frequent_answers(asked, training) == ["no", "yes", "a", "yes"]


def test_captions_alone_or_questions_alone_have_no_other_figures(model):
    captions = [sample for sample in DATA.evaluation["test"] if sample.kind == "caption"]
    figures = own_split.evaluate(model, with_test_split(*captions), batch_size=3, max_new_tokens=6).figures
    assert figures["vqa_accuracy"] is None
    assert figures["vqa_by_kind"] == {}
    assert "-" in own_split.table(figures).splitlines()[3].split()


def test_vqa_rule_with_one_answer_is_exact_match():
    samples = [Sample(0, "Q: ? A:", answer, "k") for answer in (" yes", " two", " the dog", " Yes")]
    figures = own_split.figures_of(samples, ["yes", "2", "dog", "yes"])
    assert figures["vqa_accuracy"] == figures["vqa_by_kind"]["k"] == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "tset"}, "no split 'tset'; its splits: train, test"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"max_new_tokens": 60}, "the context holds 64"),
        ({"dataset": with_test_split()}, "'test' is empty"),
        ({"dataset": with_test_split(Sample(0, "p", " a", "caption"))}, "the same image"),
        (
            {"dataset": with_test_split(Sample(0, "w" * 999, " a", "k"), Sample(1, "p", " a", "k"))},
            "the context holds 64",
        ),
        (
            {"dataset": with_test_split(SimpleNamespace(image=None, prompt="p", answer=" a", kind="k"))},
            "without an image",
        ),
        ({"dataset": dataclasses.replace(DATA, evaluation={"test": DATA.evaluation["test"]})}, "no training split"),
        ({"dataset": dataclasses.replace(DATA, images=DATA.images[:, ::2, ::2])}, "32 pixels a side"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(model, change, message):
    with pytest.raises(own_split.EvaluationError, match=message) as error:
        own_split.evaluate(model, **({"dataset": DATA} | change))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="not a model folder"):
        own_split.evaluate_run(open_token_generator, tmp_path)
    write_model_folder(tmp_path / "model", {"model": {}}, {"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="no checkpoint of a run"):
        own_split.evaluate_run(open_token_generator, tmp_path / "model")


@pytest.mark.slow
def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    script = Path(__file__).parents[2] / "eval.py"
    result = subprocess.run([sys.executable, script, "--workdir", tmp_path], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"eval.py: {tmp_path}: not a model folder")
    assert result.stderr.count("\n") == 1
