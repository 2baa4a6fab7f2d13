"""Moving averages of weights: the recurrence, on any mesh and in parts, kept by checkpoints, validated on request."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from magma_jax.config import ConfigError
from magma_jax.nn.modules import abstract
from magma_jax.runtime.sharding import MeshConfig, make_mesh, place_batch
from magma_jax.storage.model_folder import CheckpointError
from magma_jax.training.checkpoints.checkpoint import read_trained_params
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.loop import train
from magma_jax.training.monitor.writers import WatchConfig
from magma_jax.training.run import setup
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import build_program, fresh_params
from magma_jax.training.step.ema import EmaConfig
from magma_jax.training.step.optim import OptimConfig, partition
from tests.families import toy
from tests.families.toy import TOY, CountingConfig, ToyConfig

DECAY = 0.75


def run_config(**changes):
    config = RunConfig(
        model=ToyConfig(layers=1),
        data=CountingConfig(),
        optim=OptimConfig(learning_rate=1e-2, steps=4),
        ema=EmaConfig(decay=DECAY, roles=("language",)),
        steps=4,
        batch_size=8,
        log_every=1,
        checkpoint_every=1,
        validation=ValidationConfig(every=2, split="test", samples=16, ema=True),
        watch=WatchConfig(tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module", autouse=True)
def counting():
    with pytest.MonkeyPatch.context() as patch:
        data = toy.dataset()
        patch.setattr(setup, "load_dataset", lambda config: data)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(TOY, run_config(), tmp_path_factory.mktemp("ema") / "run", jax.devices()[:1])


def validation_losses(run):
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


@pytest.mark.parametrize(
    ("mesh", "accumulate"), [(MeshConfig(data=1), 1), (MeshConfig(data=2, fsdp=2, model=2), 2)], ids=["one", "eight"]
)
def test_it_follows_the_recurrence_where_the_weights_lie(mesh, accumulate):
    config = run_config(mesh=mesh, accumulate=accumulate)
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh.data == 1 else 8])
    program = build_program(TOY, config, mesh)
    params = fresh_params(TOY, program.config, program.params)
    frozen = partition(params, program.labels)[1]
    state = program.init_state(params)
    assert state.average.keys() == {path for path, label in program.labels.items() if label == "language"}
    expected = {path: np.asarray(state.trainable[path]) for path in state.average}
    batches = iter(toy.dataset().batches(8, 0, range(8)))
    for _ in range(3):
        state, _ = program.step(state, frozen, place_batch(next(batches), mesh, 8), jax.random.key(0))
        weights = {path: np.asarray(state.trainable[path]) for path in expected}
        expected = {path: DECAY * expected[path] + (1 - DECAY) * weights[path] for path in expected}
    for path, leaf in state.average.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-6, atol=1e-8, err_msg=path)
        assert not np.array_equal(leaf, state.trainable[path])
        assert leaf.sharding.is_equivalent_to(state.trainable[path].sharding, leaf.ndim)


def test_an_interrupted_run_ends_with_the_same_averages(finished, tmp_path):
    train(TOY, run_config(steps=2), tmp_path / "run", jax.devices()[:1])
    resumed = train(TOY, run_config(), tmp_path / "run", jax.devices()[:1])
    for path, leaf in finished.state.average.items():
        np.testing.assert_array_equal(resumed.state.average[path], leaf, err_msg=path)
    assert validation_losses(resumed) == validation_losses(finished)


def test_validation_and_readers_take_it_on_request(finished, tmp_path):
    plain = run_config(validation=ValidationConfig(every=2, split="test", samples=16))
    plain = train(TOY, plain, tmp_path / "run", jax.devices()[:1])
    for path, leaf in finished.state.trainable.items():
        np.testing.assert_array_equal(plain.state.trainable[path], leaf)
    # The average lags behind weights that are still getting better.
    assert all(np.array(validation_losses(finished)) > np.array(validation_losses(plain)))
    _, shapes, types = abstract(lambda: TOY.build(finished.config.model, nnx.Rngs(0)))
    weights = finished.state.trainable
    averages = {**weights, **finished.state.average}
    cases = [(finished, None, averages), (finished, False, weights), (plain, None, weights), (plain, True, averages)]
    for run, ema, expected in cases:
        params = read_trained_params(run.workdir, shapes, types, ema=ema)
        for path, leaf in expected.items():
            np.testing.assert_array_equal(params[path], leaf, err_msg=path)
    (tmp_path / "model.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="keeps no moving averages of weights"):
        read_trained_params(tmp_path, shapes, types, ema=True)


def test_configs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"ema\.decay must be at least 0 and below 1, got 1\.0"):
        EmaConfig(decay=1.0)
    with pytest.raises(ValueError, match=r"validation\.ema needs the averages: set ema\.decay"):
        run_config(ema=None)
    frozen = run_config(optim=OptimConfig(groups={"head": "frozen"}), ema=EmaConfig(decay=0.9, roles=("head",)))
    with pytest.raises(ConfigError, match=r"ema\.roles: 'head' does not learn; roles that do: language"):
        build_program(TOY, frozen, make_mesh(MeshConfig(), jax.devices()[:1]))
