"""Bucketed, packed, padded and padded to 2048: the same loss and gradients, and as many programs as lengths in use."""

import dataclasses
import functools
import json

import grain
import jax
import numpy as np
import pytest
from flax import nnx

from magma_jax.data.batches.batching import packed_batches, padded_batches
from magma_jax.data.batches.pipeline import sample_batches
from magma_jax.data.openmoji.dataset import OpenmojiConfig
from magma_jax.families.language.loss import language_loss
from magma_jax.families.magma import MAGMA
from magma_jax.families.magma.loss import caption_loss
from magma_jax.models.language.decoder import Decoder
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.magma import MagmaModel
from magma_jax.nn.modules import merge, split, variable_types
from magma_jax.training.monitor.writers import METRICS_FILE
from magma_jax.training.run import setup
from magma_jax.training.step.optim import Group, label_parameters, partition
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.terms import LOSS
from magma_jax.typing import IGNORED
from tests import tiny

LENGTHS = [3, 13, 6, 2, 9, 5, 14, 4]
PADDING = {"tokens": 298, "labels": IGNORED}

MODEL = dataclasses.replace(tiny.MODEL, lm=dataclasses.replace(tiny.MODEL.lm, layers=1))
GPT2_TINY = GPT2Config(layers=1, width=32, heads=2, feed_forward=64, vocab_rows=300, context_length=2048)

CASES = {
    "captions": (lambda: MagmaModel(MODEL, rngs=nnx.Rngs(0)), caption_loss),
    # Learned positions, where a wrong one shows at once.
    "text": (lambda: Decoder(GPT2_TINY, rngs=nnx.Rngs(0)), language_loss),
}
# The encoder works on images alone, so its features may stand for it.
GROUPS = {"language": Group(), "encoder": "frozen", "prefix": Group(), "adapter": Group()}


def _samples():
    """Samples of many lengths, most with some tokens that are not learned, and another image each."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        tokens = rng.integers(0, 290, length).astype(np.int32)
        labels = np.where(np.arange(length) < i % 3, IGNORED, tokens).astype(np.int32)
        yield {"tokens": tokens, "labels": labels, "image_rows": np.int32(i)}


def _batches(form):
    source = grain.MapDataset.source(list(_samples()))
    if form == "packed":
        return packed_batches(source, batch_size=3, rows=range(3), length=24, pack=4, padding=PADDING)
    buckets = (8, 16) if form == "bucketed" else (form,)
    # A window of buckets is sixteen batches: every sample comes eight times.
    source = source.repeat(8) if form == "bucketed" else source
    return padded_batches(source, batch_size=4, rows=range(4), buckets=buckets, padding=PADDING, seed=0)


@functools.cache
def _mean(case, form):
    """Loss and gradients of the mean over all labels of all batches."""
    create, loss = CASES[case]
    model = create()
    graphdef, params = split(model)
    learned, frozen, _ = partition(params, label_parameters(variable_types(model), GROUPS))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def sums(learned, batch):
        term = loss(merge(graphdef, learned, frozen), batch, None, options=LossOptions())[LOSS]
        return term.total, term.count

    features = np.random.default_rng(1).normal(size=(len(LENGTHS), 4, 32)).astype(np.float32)
    parts = []
    for batch in _batches(form):
        rows = batch.pop("image_rows")
        if case == "captions":
            batch["features"] = features[rows]
        (value, count), gradients = sums(learned, batch)
        parts.append((value, count, gradients))
    value, count, gradients = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    return value / count, int(count) // (8 if form == "bucketed" else 1), jax.tree.map(lambda g: g / count, gradients)


@pytest.mark.parametrize("length", [24, pytest.param(2048, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["bucketed", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_padding(case, form, length):
    expected, count, gradients = _mean(case, length)
    value, same, ours = _mean(case, form)
    assert same == count
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path, gradient in gradients.items():
        scale = float(np.abs(gradient).max())
        np.testing.assert_allclose(ours[path], gradient, atol=1e-5 * scale + 1e-9, err_msg=path)


def _run(monkeypatch, workdir, steps, pack=1, **lengths):
    """A run on the tiny dataset with batches of these lengths, and the shapes of their tokens."""
    data = tiny.dataset()

    def batches(batch_size, seed, rows=None):
        options = {"batch_size": batch_size, "length": 40, "seed": seed, "rows": rows, "pack": pack, **lengths}
        return sample_batches([data.evaluation["train"]], [1.0], data.tokenizer, **options)

    monkeypatch.setattr(setup, "load_dataset", lambda config: dataclasses.replace(data, batches=batches))
    data_config = OpenmojiConfig(length=40, pack=pack, **lengths)
    config = tiny.run_config(steps=steps, log_every=steps, checkpoint_every=steps, data=data_config)
    first = iter(batches(config.batch_size, config.seed))
    shapes = [next(first)["tokens"].shape for _ in range(steps)]
    return tiny.train(config, workdir), shapes


@pytest.mark.slow
def test_one_program_for_every_bucket_in_use(monkeypatch, tmp_path, caplog):
    with jax.log_compiles():
        _, shapes = _run(monkeypatch, tmp_path / "run", steps=4, buckets=(10,))
    assert set(shapes) == {(4, 10), (4, 40)}
    assert sum("Finished XLA compilation of jit(train_step)" in m for m in caplog.messages) == 2


@pytest.mark.slow
def test_packed_rows_are_trained_with_the_images_of_their_samples(monkeypatch, tmp_path):
    run, shapes = _run(monkeypatch, tmp_path / "run", steps=2, pack=4)
    assert set(shapes) == {(4, 40)}
    line = json.loads((run.workdir / METRICS_FILE).read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])
    assert line["grad_norm"] > 0


def test_lengths_that_contradict_each_other_are_refused():
    OpenmojiConfig(length=64, buckets=(16, 32))
    with pytest.raises(ValueError, match=r"data\.buckets \(32, 16\) must ascend and stay below data\.length 64"):
        OpenmojiConfig(length=64, buckets=(32, 16))
    with pytest.raises(ValueError, match=r"must ascend and stay below data\.length 32"):
        OpenmojiConfig(length=32, buckets=(32,))
    with pytest.raises(ValueError, match=r"data\.pack fills rows"):
        OpenmojiConfig(length=64, buckets=(32,), pack=2)
    with pytest.raises(ValueError, match=r"loss\.batch_norm=batch would count"):
        MAGMA.complete(tiny.run_config(data=OpenmojiConfig(pack=2), loss=LossOptions(batch_norm="batch")))
