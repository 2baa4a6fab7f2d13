"""Questions as classification: finetuned from a base on the answers of a dataset, asked and evaluated."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from magma_jax.config import ConfigError, to_dict
from magma_jax.data.__main__ import main as data_main
from magma_jax.data.code_pairs import CodePairsConfig
from magma_jax.data.datasets import load_dataset
from magma_jax.data.images import ImageInput
from magma_jax.data.tokenizers.text import text_tokenizer
from magma_jax.data.write.encoding import EncodeOptions, encode_folder
from magma_jax.evaluation.tasks.describing import describe_task
from magma_jax.evaluation.tasks.task import TASKS
from magma_jax.families import open_generator, open_image_encoder
from magma_jax.families.magvlt import MAGVLT
from magma_jax.families.magvlt.loading import read_class_names
from magma_jax.families.magvlt.options import MagvltOptions
from magma_jax.inference.answers import AnswerOptions
from magma_jax.models.magvlt.model import MagvltModel
from magma_jax.nn.modules import split
from magma_jax.storage.model_folder import CheckpointError, write_model_folder
from magma_jax.training.loop import train
from magma_jax.training.step.optim import OptimConfig
from magma_jax.typing import IGNORED
from tests import datafolders
from tests.families import magvlt_tiny

COLOURS = datafolders.COLOURS
MODEL = dataclasses.replace(magvlt_tiny.MODEL, text_rows=2048)
LOSS = MagvltOptions(
    task_weights=(0.0, 1.0, 0.0), label_smoothing=0.0, length_weight=0.0, unroll_weight=0.0, mixsel_weight=0.0
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset of questions, its codes, its answers, and a base without classes."""
    folder = tmp_path_factory.mktemp("answers")
    source = datafolders.folder(folder / "images", datafolders.questions())
    tokenizer = magvlt_tiny.write_tokenizer(folder / "vqgan")
    encode_folder(source, folder / "codes", open_image_encoder(tokenizer), EncodeOptions(workers=0))
    assert data_main(["answers", source, str(folder / "answers.json")]) == 0
    params = split(MagvltModel(MODEL, rngs=nnx.Rngs(0)))[1]
    held = {f"image_tokenizer/{path}": leaf for path, leaf in magvlt_tiny.tokenizer_params().items()}
    write_model_folder(folder / "base", {"model": to_dict(MODEL)}, params | held)
    return folder


@pytest.fixture(scope="module")
def config(folders):
    answers = tuple(json.loads((folders / "answers.json").read_text()))
    assert answers == tuple(sorted(COLOURS))
    splits = {split: (str(folders / "codes"),) for split in ("train", "validation")}
    data = CodePairsConfig(folders=splits, classes=answers, tokenizer="quickstart", clean_up="none")
    return magvlt_tiny.run_config(
        "",
        model=dataclasses.replace(MODEL, classes=4, residual_dropout=0.1),
        data=data,
        loss=LOSS,
        weights={},
        base=str(folders / "base"),
        optim=OptimConfig(learning_rate=3e-3, schedule="constant"),
        steps=40,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train(MAGVLT, config, tmp_path_factory.mktemp("magvlt_answers") / "run", jax.devices()[:1])


def test_it_answers_and_is_evaluated(finished, folders):
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert np.mean([line["accuracy"] for line in trained[-10:]]) > 0.9
    model = open_generator(finished.workdir)
    image = ImageInput(Image.new("RGB", (80, 64), COLOURS["blue"]))
    found = model.answer(image, "What colour is it?", n=4)
    assert found[0][0] == "blue"
    assert sum(np.exp(score) for _, score in found) == pytest.approx(1)
    ((answer,),) = model.answers([[image, "What colour is it?"]], AnswerOptions())
    assert (answer.text, answer.finish) == ("blue", "stop")
    task = dataclasses.replace(TASKS["vqav2"], data=str(folders / "images"))
    result = describe_task(model, task)
    assert sorted(result.answers) == sorted(COLOURS)
    assert result.stamp["decoding"] == "likeliest of 4 answers"
    with pytest.raises(ValueError, match="answers questions by a classifier, without shots; take a question task"):
        describe_task(model, dataclasses.replace(TASKS["coco"], data=str(folders / "images")))
    with pytest.raises(CheckpointError, match="names 0 answers, but its classifier has 4 classes"):
        read_class_names(folders / "base", finished.config.model)


def test_answers_that_are_no_class_teach_nothing(config):
    """Of three annotators one says "dark red", which the folder's commonest answers lack."""
    data = load_dataset(dataclasses.replace(config.data, length=10))
    batch = next(iter(data.batches(64, 0, range(64))))
    assert set(batch["labels"].tolist()) == {IGNORED, 0, 1, 2, 3}
    assert 0.1 < np.mean(batch["labels"] == IGNORED) < 0.6
    (held_out,) = data.validation_batches("validation", 4, 4, range(4))
    assert sorted(held_out["labels"].tolist()) == [0, 1, 2, 3]
    tokens = text_tokenizer("quickstart").encode("What colour is it?")
    assert held_out["tokens"][0, : len(tokens)].tolist() == tokens


def test_a_step_is_what_it_is_compiled_for(finished, config):
    shapes = MAGVLT.batch_shapes(finished.program)
    assert set(shapes) == {"codes", "tokens", "lengths", "labels"}
    program = finished.program
    flops = MAGVLT.flops(
        config.model, program.params, program.labels, {name: shape for name, (shape, _) in shapes.items()}, config.loss
    )
    layers = sum(leaf.size for path, leaf in program.params.items() if path.startswith("layers/") and leaf.ndim > 2)
    assert flops.trained == 8 * 6 * (layers * config.model.length + 4 * config.model.width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 3}, "model.classes is 3, but data.classes names 4 answers"),
        ({"classes": 0}, "model.classes is 0, but data.classes names 4 answers"),
    ],
)
def test_refused_runs(config, tmp_path, changes, message):
    model = dataclasses.replace(config.model, **changes)
    with pytest.raises(ConfigError, match=message):
        train(MAGVLT, dataclasses.replace(config, model=model), tmp_path / "run", jax.devices()[:1])
    nameless = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=()))
    program = SimpleNamespace(config=nameless)
    with pytest.raises(
        ConfigError, match=r"data\.classes does not name the 4 answers .* magma_jax\.data answers writes"
    ):
        MAGVLT.prepare(program, None, {})
    mixing = dataclasses.replace(config, loss=dataclasses.replace(LOSS, mixsel_weight=0.5))
    with pytest.raises(ConfigError, match=r"questions have the loss of their answers alone; set .*mixsel_weight=0.0"):
        train(MAGVLT, mixing, tmp_path / "run", jax.devices()[:1])


def test_a_model_without_classes_is_told_so():
    with pytest.raises(ValueError, match="this model has no classifier of answers; build it with"):
        MagvltModel(MODEL, rngs=nnx.Rngs(0)).class_logits(jnp.zeros((1, MODEL.width)))
    with pytest.raises(ValueError, match="a causal model has no classes"):
        dataclasses.replace(MODEL, causal=True, classes=3)
    with pytest.raises(ValueError, match="an answer is there twice"):
        CodePairsConfig(classes=("yes", "yes"))


def test_no_answers_to_write(tmp_path, capsys):
    source = datafolders.folder(tmp_path / "images", datafolders.captions(2))
    assert data_main(["answers", source, str(tmp_path / "answers.json")]) == 2
    assert "has no questions with answers" in capsys.readouterr().err
    assert not (tmp_path / "answers.json").exists()
    assert data_main(["answers", source, str(tmp_path / "answers.json"), "--count", "1"]) == 2
    assert "--count must be at least 2" in capsys.readouterr().err
