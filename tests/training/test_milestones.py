"""What happens between steps: what is validated and saved, and when a run ends."""

import contextlib
import dataclasses

import jax
import pytest

from magma_jax.training.checkpoints.checkpoint import RunCheckpoints
from magma_jax.training.checkpoints.early_stopping import BestStep, ValidationConfig
from magma_jax.training.faults.interruption import StopRequest
from magma_jax.training.milestones import Milestones
from magma_jax.training.run.setup import Run
from magma_jax.training.step.train_step import TrainState
from tests import tiny

KEY = jax.random.key(0)


class Saved(RunCheckpoints):
    """In place of checkpoints on disk: the snapshots that were saved, by step."""

    def __init__(self):
        self.snapshots = {}

    def check(self):
        pass

    def save(self, snapshot):
        self.snapshots[snapshot.state.step] = snapshot


def _run(config, step, best=BestStep()):
    run = Run.__new__(Run)  # without a model
    run.config, run.state, run.best, run.interrupted = config, TrainState(step, {}, {}, None), best, False
    return run


def _go(losses, *, first=0, best=BestStep(), stop_at=None, steps=8, checkpoint_every=4, **validation):
    """Steps of a run whose validation losses are ``losses[step]``."""
    config = tiny.run_config(
        steps=steps, checkpoint_every=checkpoint_every, validation=ValidationConfig(**{"every": 2} | validation)
    )
    run = _run(config, first, best)
    stop, saved, seen = StopRequest(), Saved(), []

    def validate():
        seen.append(run.state.step)
        return {"validation_loss": losses[run.state.step]}

    recorded = {}
    milestones = Milestones(
        run, KEY, dict, saved, stop, validate, recorded.__setitem__, contextlib.nullcontext, lambda: None
    )
    goes_on = milestones.begin(first)
    while goes_on:
        run.state = TrainState(run.state.step + 1, {}, {}, None)
        if run.state.step == stop_at:
            stop.signal = "SIGTERM"
        goes_on = milestones.after(run.state.step)
    assert recorded == {step: {"validation_loss": losses[step]} for step in seen}
    return run, saved.snapshots, seen


def test_every_improvement_is_saved_and_so_is_the_last_step():
    run, saved, seen = _go({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25})
    assert seen == [2, 4, 6, 8]
    assert sorted(saved) == [2, 4, 8]
    assert run.best == saved[8].best == BestStep(4, 2.0, waited=2, validated=8)
    assert not run.interrupted


def test_the_last_step_is_validated_and_saved_whatever_the_intervals():
    _, saved, seen = _go({3: 3.0, 6: 2.0, 7: 4.0}, steps=7, every=3, checkpoint_every=5)
    assert (sorted(saved), seen) == ([3, 5, 6, 7], [3, 6, 7])


def test_patience_ends_a_run_and_a_finished_run_stays_finished(capsys):
    losses = {2: 3.0, 4: 3.5, 6: 3.25, 8: 1.0}
    run, saved, _ = _go(losses, patience=2)
    assert (run.state.step, sorted(saved), run.interrupted) == (6, [2, 4, 6], False)
    assert "ends early: no improvement in 2 validations; best 3.0000 at step 2" in capsys.readouterr().err
    assert _go(losses, first=6, best=run.best, patience=2)[0].state.step == 6
    assert _go(losses, first=6, best=run.best, patience=3)[0].state.step == 8  # more patience, and it goes on


@pytest.mark.parametrize("stop_at", [3, 4, 5, 6])
def test_an_interrupted_run_ends_where_it_would_have_ended(stop_at):
    losses = {2: 3.0, 4: 3.5, 6: 2.0, 8: 2.5, 10: 2.5, 12: 0.0}
    whole, _, _ = _go(losses, steps=12, patience=2)
    first, saved, seen = _go(losses, steps=12, patience=2, stop_at=stop_at)
    assert (first.state.step, first.interrupted) == (stop_at, True)
    # A validation takes long, and whoever interrupts is in a hurry: it is made up for at the next start.
    assert stop_at in saved
    assert stop_at not in seen
    second, _, _ = _go(losses, steps=12, patience=2, first=stop_at, best=saved[stop_at].best)
    assert (
        (second.state.step, second.best)
        == (whole.state.step, whole.best)
        == (10, BestStep(6, 2.0, waited=2, validated=10))
    )


def test_a_signal_at_the_last_step_interrupts_nothing():
    run, saved, seen = _go({8: 1.0}, every=8, stop_at=8)
    assert not run.interrupted
    assert (sorted(saved), seen) == ([4, 8], [8])


def test_a_run_that_may_not_be_kept_is_not_saved():
    def refuse():
        raise FloatingPointError("step 4")

    config = dataclasses.replace(tiny.run_config(checkpoint_every=4), steps=8)
    saved = Saved()
    milestones = Milestones(
        _run(config, 4), KEY, dict, saved, StopRequest(), None, print, contextlib.nullcontext, refuse
    )
    assert milestones.after(3)
    with pytest.raises(FloatingPointError):
        milestones.after(4)
    assert not saved.snapshots
