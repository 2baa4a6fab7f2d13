"""A NaN changes nothing, is counted, leaves its batch behind, and stops the run when the policy says so."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from magma_jax.families.magma import MAGMA
from magma_jax.training.faults.nonfinite import MAX_DUMPS, NonfiniteGuard
from magma_jax.training.run import setup
from tests import tiny


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    data = tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)


@pytest.fixture
def poisoned(monkeypatch):
    """Puts a NaN into the features of an image in the given steps (0, 1, ...)."""

    def poison(*steps):
        def loader(*arguments):
            prepare, count = MAGMA.prepare(*arguments), iter(range(1000))
            return lambda batch: _with_nan(prepare(batch)) if next(count) in steps else prepare(batch)

        monkeypatch.setattr(tiny, "family_of", lambda model: dataclasses.replace(MAGMA, prepare=loader))

    return poison


def _with_nan(batch):
    features = batch["features"].copy()
    features[0, 0, 0] = np.nan
    return batch | {"features": features}


def _config(**changes):
    """With an encoder that is frozen, which compiles in half the time."""
    config = tiny.run_config(**changes)
    optim = dataclasses.replace(config.optim, groups={**config.optim.groups, "encoder": "frozen"})
    return dataclasses.replace(config, optim=optim)


def _leaves(run):
    state = (run.state.trainable, run.state.statistics, run.state.opt_state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_skipped_step_changes_nothing_and_its_batch_is_kept(poisoned, tmp_path, capsys):
    config = _config(nonfinite="skip", steps=2)
    start = tiny.train(dataclasses.replace(config, steps=0), tmp_path / "run")
    poisoned(0, 1)
    run = tiny.train(config, tmp_path / "run")
    assert int(run.state.step) == 2
    for before, after in zip(_leaves(start), _leaves(run), strict=True):
        np.testing.assert_array_equal(after, before)
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 2]
    path = run.workdir / "nonfinite" / "step_000002.npz"
    assert f"step 2: loss or gradient is not finite; its batch is in {path}" in capsys.readouterr().err
    with np.load(path) as file:
        assert np.isnan(file["features"][0, 0, 0])
        assert file["tokens"].shape == (4, 40)
        assert file["step"] == 1
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        np.testing.assert_array_equal(file["key"], jax.random.key_data(key))


@pytest.mark.slow
def test_stop_ends_the_run_at_the_last_good_state(poisoned, tmp_path):
    poisoned(1)
    config = _config(checkpoint_every=3, log_every=3)
    with pytest.raises(FloatingPointError, match=r"step 2: .*its batch is in .*step_000002\.npz; lower") as error:
        tiny.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def _guard(tmp_path, policy="skip", limit=2):
    return NonfiniteGuard(policy, limit, tmp_path, jax.random.key(0), lambda line: None)


def _flag(value):
    return jax.numpy.int32(value)


def test_too_many_in_a_row_stop_the_run(tmp_path):
    guard = _guard(tmp_path)
    for step, flag in enumerate([1, 1, 0, 1, 1]):
        guard.watch(step, _flag(flag), {"tokens": np.zeros(1)})
    guard.check()
    assert guard.skipped == 4
    guard.watch(5, _flag(1), {"tokens": np.zeros(1)})
    with pytest.raises(FloatingPointError, match="number 3 in a row, and nonfinite_limit is 2"):
        guard.check()


def test_a_step_is_looked_at_when_the_next_has_started(tmp_path):
    guard = _guard(tmp_path, "stop")
    guard.watch(0, _flag(1), {"tokens": np.zeros(1)})
    with pytest.raises(FloatingPointError, match="step 1"):
        guard.watch(1, _flag(0), {"tokens": np.zeros(1)})


def test_only_the_first_batches_are_kept(tmp_path):
    guard = _guard(tmp_path, limit=100)
    for step in range(MAX_DUMPS + 2):
        guard.watch(step, _flag(1), {"tokens": np.zeros(1, jax.numpy.bfloat16)})
    assert len(list((tmp_path / "nonfinite").iterdir())) == MAX_DUMPS
