"""Runs of every language model: inside MAGMA from training to text, and alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from magma_jax import Magma
from magma_jax.families.language import LANGUAGE
from magma_jax.models.language.gpt2 import GPT2Config
from magma_jax.models.language.gpt_neo import GPTNeoConfig
from magma_jax.models.language.gpt_neox import GPTNeoXConfig
from magma_jax.nn.adapters import AdapterConfig
from magma_jax.nn.modules import abstract, merge, split
from magma_jax.training.run import setup
from magma_jax.training.step.options import LossOptions
from magma_jax.training.step.train_step import init_state, make_train_step
from tests import tiny

SIZES = {"layers": 2, "width": 32, "heads": 2, "feed_forward": 64, "vocab_rows": 300, "context_length": 64}
LANGUAGE_MODELS = {
    "gpt2": GPT2Config(**SIZES),
    "gpt_neo": GPTNeoConfig(**SIZES, window=5),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_dim=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_from_training_to_text(kind, tmp_path, monkeypatch):
    data = tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)
    adapter = AdapterConfig("scaled_parallel", 4)
    model = dataclasses.replace(tiny.MODEL, lm=LANGUAGE_MODELS[kind], attn_adapter=adapter)
    run = tiny.train(tiny.run_config(model=model, steps=2, checkpoint_every=2), tmp_path / "run")
    assert run.frozen
    assert all(path.startswith("lm/") and "_adapter/" not in path for path in run.frozen)
    # A tied head is one frozen leaf and no other.
    assert ("lm/lm_head/weight" in run.frozen) == (kind == "gpt_neox")

    magma = Magma.from_checkpoint(tmp_path / "run")
    assert magma.config == model
    for path, leaf in {**run.frozen, **run.state.trainable}.items():
        np.testing.assert_array_equal(magma.params[path], leaf, err_msg=path)
    assert isinstance(magma.generate(magma.preprocess_inputs(["A picture of"]), max_steps=4)[0], str)
    with pytest.raises(ValueError, match="65 positions exceed the context of 64"):
        magma(jnp.zeros((1, 65, 32)))
    with pytest.raises(ValueError, match="the context holds 64"):
        magma.generate(jnp.zeros((1, 60, 32)), max_steps=5)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("gpt_neo", marks=pytest.mark.slow), "gpt_neox"])
def test_alone(kind):
    """A run of text: every leaf learns, a tied table from both of its uses, and the loss falls."""
    create = functools.partial(LANGUAGE.build, LANGUAGE_MODELS[kind])
    definition = abstract(lambda: create(nnx.Rngs(0)))[0]
    params = jax.jit(lambda: split(create(nnx.Rngs(0)))[1])()
    optimizer = optax.adam(3e-3)
    loss = functools.partial(LANGUAGE.loss, options=LossOptions())
    step = jax.jit(make_train_step(definition, loss, optimizer))
    state = init_state(params, {}, optimizer)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 24)))
    losses = []
    for _ in range(3):
        state, metrics = step(state, {}, {"tokens": tokens, "labels": tokens}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert all(not np.array_equal(leaf, params[path]) for path, leaf in state.trainable.items())
    # Rows of words that do not occur learn only where the table is the head.
    absent = np.setdiff1d(np.arange(300), tokens)
    moved = np.asarray(state.trainable["wte/weight"] != params["wte/weight"])[absent]
    assert moved.all() == moved.any() == (kind != "gpt_neox")
    assert merge(definition, state.trainable).logits(jnp.zeros((1, 32))).shape == (1, 300)
