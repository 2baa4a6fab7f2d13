"""The loop: what learns changes, what is frozen does not, and a run continues exactly where it stopped."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from magma_jax import Magma
from magma_jax.config import ConfigError
from magma_jax.training.checkpoints.checkpoint import RunCheckpoints
from magma_jax.training.checkpoints.early_stopping import ValidationConfig
from magma_jax.training.monitor.writers import METRICS_FILE
from magma_jax.training.run import setup
from magma_jax.training.step.options import LossOptions
from tests import tiny


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    """The tiny dataset in place of the drawings."""
    data = tiny.dataset()
    monkeypatch.setattr(setup, "load_dataset", lambda config: data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(setup, "load_dataset", lambda config: tiny.dataset())
        workdir = tmp_path_factory.mktemp("run") / "four"
        return tiny.train(tiny.run_config(), workdir)


def _metrics(run):
    return [json.loads(line) for line in (run.workdir / METRICS_FILE).read_text().splitlines()]


def _arrays(run):
    return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(run.state)}


def _assert_same_bits(run, other):
    expected, got = _arrays(run), _arrays(other)
    assert expected.keys() == got.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaf, got[path], err_msg=path)
    losses = ({entry["step"]: entry["loss"] for entry in _metrics(run)} for run in (run, other))
    assert next(losses) == next(losses)


def test_frozen_leaves_keep_their_bits_and_others_change(finished, tmp_path):
    start = tiny.train(tiny.run_config(steps=0), tmp_path / "start")
    assert start.frozen
    assert all("_adapter" not in path and path.startswith("lm/") for path in start.frozen)
    for path, leaf in start.frozen.items():
        np.testing.assert_array_equal(leaf, finished.frozen[path], err_msg=path)
    for path, leaf in start.state.trainable.items():
        assert not np.array_equal(leaf, finished.state.trainable[path]), path


def test_losses_are_finite_and_logged_every_step(finished):
    metrics = _metrics(finished)
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in metrics)


def test_two_steps_then_two_more_equal_four_bit_for_bit(finished, tmp_path):
    schedule = dataclasses.replace(tiny.run_config().optim, steps=4)
    tiny.train(tiny.run_config(steps=2, optim=schedule), tmp_path / "run")
    resumed = tiny.train(tiny.run_config(steps=4, optim=schedule), tmp_path / "run")
    _assert_same_bits(finished, resumed)


@pytest.mark.parametrize(
    ("when", "every", "left", "kept"),
    [
        pytest.param("saving", 1, ["1", "2", "3.orbax-checkpoint-tmp"], ["3", "4"], marks=pytest.mark.slow),
        pytest.param("between", 2, ["2"], ["2", "4"], marks=pytest.mark.slow),
        pytest.param("asked", 4, ["2"], ["2", "4"], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, when, every, left, kept):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tests.training.killed", str(run), when]
    stopped = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    if when == "asked":
        assert stopped.returncode == 0, stopped.stderr
        line = "SIGTERM: stopped after step 2 of 4, which is saved; start again to continue"
        assert stopped.stderr.splitlines()[-1] == line
    else:
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr

    def steps():
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    assert steps() == left
    _assert_same_bits(finished, tiny.train(tiny.run_config(checkpoint_every=every), run))
    assert steps() == kept


@pytest.mark.slow
def test_a_run_without_improvement_ends_early_and_stands_at_its_best_step(tmp_path):
    # Nothing improves by ten nats, so the first validation stays the best.
    validation = ValidationConfig(every=1, split="test", samples=5, patience=2, min_delta=10.0)
    run = tiny.train(tiny.run_config(validation=validation, keep_checkpoints=1), tmp_path / "run")
    assert (int(run.state.step), run.best.step, run.best.waited) == (3, 1, 2)
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == ["1", "3"]
    losses = {entry["step"]: entry["validation_loss"] for entry in _metrics(run) if "validation_loss" in entry}
    assert losses.keys() == {1, 2, 3}
    assert losses[1] == pytest.approx(run.best.loss)
    assert losses[3] < losses[1]  # it did learn
    with RunCheckpoints(run.workdir) as checkpoints:
        assert checkpoints.result_step() == 1
    params = Magma.from_checkpoint(run.workdir).params
    assert all(not np.array_equal(leaf, params[path]) for path, leaf in run.state.trainable.items())
    again = tiny.train(tiny.run_config(validation=validation, keep_checkpoints=1), run.workdir)
    assert int(again.state.step) == 3
    more = dataclasses.replace(validation, patience=3)
    again = tiny.train(tiny.run_config(validation=more, keep_checkpoints=1), run.workdir)
    assert (int(again.state.step), again.best.waited) == (4, 3)


def test_a_finished_run_is_not_trained_again(finished):
    before = _arrays(finished)
    again = tiny.train(tiny.run_config(), finished.workdir)
    for path, leaf in _arrays(again).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_another_config_in_the_same_folder_is_refused(finished):
    with pytest.raises(ConfigError, match=r"another config \(batch_size is 4 there and 2 here\)"):
        tiny.train(tiny.run_config(batch_size=2), finished.workdir)


def test_a_frozen_encoder_is_run_once_and_has_no_optimizer_state(tmp_path):
    config = tiny.run_config()
    groups = {**config.optim.groups, "encoder": "frozen"}
    run = tiny.train(
        dataclasses.replace(config, optim=dataclasses.replace(config.optim, groups=groups)), tmp_path / "run"
    )
    assert not any("encoder" in path for path in run.state.trainable)
    assert not any("image_prefix/encoder" in path for path in _arrays(run) if "opt_state" in path)


def test_batch_norm_in_batch_mode_updates_its_statistics(tmp_path):
    model = dataclasses.replace(tiny.MODEL, encoder=tiny.RESNET)
    for mode, expected in (("frozen", 0), ("batch", 1)):
        config = tiny.run_config(steps=1, model=model, loss=LossOptions(batch_norm=mode))
        # Frozen too: features computed once would never see the batch.
        groups = {**config.optim.groups, "encoder": "frozen"}
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, groups=groups))
        run = tiny.train(config, tmp_path / mode)
        assert int(run.state.statistics["image_prefix/encoder/bn1/num_batches_tracked"]) == expected


def test_a_run_folder_loads_for_inference_with_the_trained_weights(finished):
    model = Magma.from_checkpoint(finished.workdir)
    for path, leaf in finished.state.trainable.items():
        np.testing.assert_array_equal(leaf, model.params[path], err_msg=path)
    for path, leaf in finished.frozen.items():
        np.testing.assert_array_equal(leaf, model.params[path], err_msg=path)


def test_the_step_compiles_once(tmp_path, caplog):
    with jax.log_compiles():
        tiny.train(tiny.run_config(), tmp_path / "run")
    assert sum("Finished XLA compilation of jit(train_step)" in message for message in caplog.messages) == 1
