"""Runs that read dataset folders, and runs that start from other runs: trained, resumed, finetuned, ended early."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.config import ConfigError, apply_overrides, load_config_file, to_dict
from magma_jax.data.batches.sources import SourceConfig
from magma_jax.data.datasets import load_dataset
from magma_jax.data.folder_dataset import FoldersConfig
from magma_jax.data.tokenizers.byte_level import train_bpe
from magma_jax.families import run_config
from magma_jax.families.magma.image_features import KeptFeatures
from magma_jax.inference.image_features import encode_all
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.monitor.writers import METRICS_FILE
from magma_jax.training.step.optim import OptimConfig
from tests import datafolders, tiny

CONFIGS = Path(__file__).parents[2] / "configs"
# Quick to compile.
MODEL = dataclasses.replace(tiny.MODEL, lm=dataclasses.replace(tiny.MODEL.lm, layers=1), attn_adapter=None)
GROUPS = {"encoder": "frozen"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizer, a folder of captions with a damaged image, one of questions, one of statements."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = train_bpe(["image number the Q: What colour is it? A: red green blue white"], 299)
    tokenizer.save(root / "tokenizer")
    captions = datafolders.captions()
    captions[4] = dataclasses.replace(captions[4], image=captions[4].image[:-400])
    statements = [
        dataclasses.replace(record, questions=(dataclasses.replace(record.questions[0], answers=(answer,)),))
        for record, answer in zip(datafolders.questions(), ("yes", "no", "yes", "no"), strict=True)
    ]
    return {
        "tokenizer": str(root / "tokenizer"),
        "captions": datafolders.folder(root / "captions", captions, check="header"),
        "questions": datafolders.folder(root / "questions", datafolders.questions()),
        "statements": datafolders.folder(root / "statements", statements),
    }


def data_of(folders, *sources, **changes):
    splits = {"train": sources, "validation": sources[-1:]}
    options = {"tokenizer": folders["tokenizer"], "length": 40, "workers": 0} | changes
    return FoldersConfig(folders=splits, **options)


def lines_of(run, name=METRICS_FILE):
    return [json.loads(line) for line in (run.workdir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def mixture(folders):
    return tiny.run_config(
        model=MODEL,
        optim=OptimConfig(learning_rate=1e-2, groups=GROUPS),
        data=data_of(folders, folders["captions"], folders["questions"]),
        validation=ValidationConfig(every=2, samples=3),
    )


@pytest.fixture(scope="module")
def pretrained(mixture, tmp_path_factory):
    """Four steps on the mixture."""
    return tiny.train(mixture, tmp_path_factory.mktemp("runs") / "pretrained")


def test_a_mixture_is_trained_validated_and_what_was_skipped_is_listed(pretrained):
    lines = lines_of(pretrained)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert [line["skipped_samples"] for line in lines if "loss" in line][-1] == 1
    (skipped,) = lines_of(pretrained, "skipped.jsonl")
    assert (skipped["row"], skipped["reason"]) == (4, "image damaged")
    assert skipped["folder"].endswith("captions")
    # The vocabulary goes with the run.
    assert len(Magma.from_checkpoint(pretrained.workdir).tokenizer) == len(pretrained.dataset.tokenizer)


def test_features_of_a_frozen_encoder_are_computed_once(pretrained):
    program, images = pretrained.program, pretrained.dataset.images
    kept = KeptFeatures(program, pretrained.params)
    batch = {"image_rows": np.array([3, 12, -1, 3]), "tokens": np.zeros((4, 5), np.int32)}
    batch["images"] = images[[3, 12, 0, 3]]
    batch["images"][2] = 0
    first = kept({**batch})
    assert first.keys() == {"tokens", "features"}
    np.testing.assert_allclose(
        first["features"][[0, 1]], encode_all(images[[3, 12]], program.graphdef, pretrained.params), atol=1e-5
    )
    # What is known is not looked at again, and a place without an image is no image.
    again = kept({**batch, "image_rows": np.array([12, 3, 3, -1]), "images": 0 * batch["images"]})
    np.testing.assert_array_equal(again["features"], first["features"][[1, 0, 0, 2]])
    full = KeptFeatures(program, pretrained.params, nbytes=0)
    assert full({**batch}).keys() == {"tokens", "images"}


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bits(pretrained, mixture, tmp_path):
    optim = dataclasses.replace(mixture.optim, steps=4)
    tiny.train(dataclasses.replace(mixture, steps=2, optim=optim), tmp_path / "run")
    resumed = tiny.train(dataclasses.replace(mixture, optim=optim), tmp_path / "run")
    for path, leaf in pretrained.state.trainable.items():
        np.testing.assert_array_equal(resumed.state.trainable[path], leaf, err_msg=path)
    assert lines_of(resumed, "skipped.jsonl") == lines_of(pretrained, "skipped.jsonl")
    assert resumed.best == pretrained.best


def finetuning(folders, pretrained, **changes):
    source = SourceConfig(folders["questions"], texts="questions", learn_prompt=False)
    config = tiny.run_config(
        model=MODEL,
        # The vocabulary is that of the base.
        data=data_of(folders, source, tokenizer=None),
        base=str(pretrained.workdir),
        optim=OptimConfig(learning_rate=3e-2, groups=GROUPS | {"adapter": "frozen"}),
        validation=ValidationConfig(every=1, patience=2),
        steps=20,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finetuned(folders, pretrained, tmp_path_factory):
    return tiny.train(finetuning(folders, pretrained), tmp_path_factory.mktemp("runs") / "finetuned")


def test_finetuning_starts_where_the_pretrained_run_ended(pretrained, finetuned):
    """The adapters are frozen here but were trained there: their values are those after training."""
    for path, leaf in pretrained.state.trainable.items():
        if "_adapter/" in path:
            np.testing.assert_array_equal(finetuned.frozen[path], leaf, err_msg=path)
    restored = Magma.from_checkpoint(finetuned.workdir).params
    for path, leaf in finetuned.frozen.items():
        np.testing.assert_array_equal(restored[path], leaf, err_msg=path)


def test_finetuning_ends_early_at_its_best_validation_loss(finetuned):
    losses = [line["validation_loss"] for line in lines_of(finetuned) if "validation_loss" in line]
    assert min(losses) < losses[0]
    best = 1 + int(np.argmin(losses))
    # Too high a rate for long: it has stopped two steps behind the best one, or learned to the end.
    assert len(losses) == min(best + 2, 20)
    with RunCheckpoints(finetuned.workdir) as checkpoints:
        assert checkpoints.result_step() == finetuned.best.step == best


@pytest.mark.slow
def test_a_head_for_classes_learns_from_the_last_word_of_a_statement(folders, pretrained, tmp_path):
    source = SourceConfig(folders["statements"], texts="questions", question_prompt="{}")
    model = dataclasses.replace(MODEL, classes=2)
    data = data_of(folders, source, tokenizer=None, classes=("yes", "no"))
    config = finetuning(folders, pretrained, model=model, data=data, validation=ValidationConfig(every=30))
    run = tiny.train(dataclasses.replace(config, steps=30), tmp_path / "run")
    learned = [line["loss"] for line in lines_of(run) if "loss" in line]
    assert learned[0] == pytest.approx(np.log(2), abs=0.7)
    assert min(learned) < 0.6 * learned[0]
    assert "class_head/weight" in run.state.trainable
    assert run.program.labels["class_head/weight"] == "head"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "okvqa", "gqa", "vizwiz", "coco", "nocaps", "snli_ve"])
def test_the_configs_that_finetune_run(folders, pretrained, tmp_path, task):
    """Their data, losses and early stopping, on the tiny model and folders of the same kind."""
    config = load_config_file(CONFIGS / f"finetune_{task}.py")
    records = {"coco": "captions", "nocaps": "captions", "snli_ve": "statements"}.get(task, "questions")
    config.data.folders = {
        split: [source_at(source, folders[records]) for source in sources]
        for split, sources in config.data.folders.items()
    }
    config.model = to_dict(MODEL) | {"classes": config.model.get("classes", 0)}
    if task == "snli_ve":
        assert config.data.classes == ("entailment", "neutral", "contradiction")
        config.data.classes = ("yes", "no", "perhaps")
    changes = ["steps=2", "batch_size=4", "data.workers=0", "data.length=50", "validation.every=1", "log_every=1"]
    changes += ["watch.samples_every=0", f"base={pretrained.workdir}", f"optim.groups={GROUPS}"]
    run = tiny.train(run_config(apply_overrides(config, changes)), tmp_path / "run")
    losses = [line["validation_loss"] for line in lines_of(run) if "validation_loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert run.config.optim.learning_rate == (3e-4 if task == "snli_ve" else 7e-4)


def source_at(source, path):
    """A source of a config, with another folder."""
    return {"path": path} | ({} if isinstance(source, str) else dict(source) | {"path": path})


def test_configs_that_contradict_their_model_are_refused(folders, pretrained, tmp_path):
    data = data_of(folders, folders["questions"])
    with pytest.raises(ValueError, match=r"data\.classes names 0 classes, but model\.classes is 2"):
        tiny.train(tiny.run_config(data=data, model=dataclasses.replace(tiny.MODEL, classes=2)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.kind 'folders': a model of the family language learns from"):
        tiny.train(tiny.run_config(data=data, model=tiny.MODEL.lm), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the tokenizer has 50257 tokens, but the model embeds 300"):
        tiny.train(tiny.run_config(data=dataclasses.replace(data, tokenizer="gpt2")), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*nowhere is not there"):
        load_dataset(dataclasses.replace(data, tokenizer="nowhere"))
    wider = dataclasses.replace(MODEL, prefix=dataclasses.replace(MODEL.prefix, layernorm=False))
    with pytest.raises(ConfigError, match=r"holds another model \(prefix\.layernorm differ\)"):
        tiny.train(finetuning(folders, pretrained, model=wider), tmp_path / "other")
