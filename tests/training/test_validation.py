"""The validation loss: over tokens, whatever the batches, on samples that stay the same."""

import dataclasses

import jax
import numpy as np
import pytest

from magma_jax.config import ConfigError
from magma_jax.data.batches.held_out import spaced_samples
from magma_jax.data.batches.pipeline import encode_sample
from magma_jax.families import family_of
from magma_jax.families.magma.image_features import image_loader
from magma_jax.families.magma.loss import caption_loss
from magma_jax.nn.modules import merge
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.run import setup
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import LOSS
from magma_jax.training.validation import make_validation
from tests import tiny


@pytest.mark.slow
def test_the_loss_is_the_mean_over_tokens_in_batches_of_any_size(tmp_path, monkeypatch):
    data = tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)
    config = tiny.run_config(validation=ValidationConfig(every=1, split="test"))
    run = setup.prepare_run(family_of(config.model), config, tmp_path / "run", jax.devices()[:1])
    prepare = image_loader(data.images, run.program, run.params)
    # One sample after the other; eight samples make batches of 3, 3 and 2.
    model = merge(run.program.graphdef, run.params)
    one = jax.jit(lambda batch: caption_loss(model, batch, None, options=LossOptions())[LOSS])
    rows = [encode_sample(sample, data.tokenizer, config.data.length) for sample in data.evaluation["test"]]
    sums = [one(prepare({name: np.asarray(array)[None] for name, array in row.items()})) for row in rows]
    losses, counts = (np.array([getattr(term, part) for term in sums], np.float64) for part in ("total", "count"))
    assert len(set(counts)) > 1  # else a mean of means would pass
    expected = losses.sum() / counts.sum()
    for batch_size in (8, 3):
        run.config = dataclasses.replace(config, batch_size=batch_size)
        validate = make_validation(run, prepare)
        assert validate()["validation_loss"] == pytest.approx(expected, rel=1e-6)
        assert 0 <= validate()["validation_accuracy"] <= 1
        assert validate() == validate()


def test_the_samples_are_evenly_spaced_and_always_the_same():
    samples = list(range(100))

    def chosen(number, split="test"):
        return spaced_samples({"train": samples, "test": samples, "empty": []}, split, number)

    assert chosen(4) == [0, 33, 66, 99]
    assert chosen(100) == chosen(1000) == samples
    for split in ("empty", "validation"):
        with pytest.raises(ConfigError, match=f"validation.split '{split}': the dataset has train, test$"):
            chosen(4, split)
    with pytest.raises(ConfigError, match="has no samples to validate on"):
        spaced_samples({}, "test", 4)
