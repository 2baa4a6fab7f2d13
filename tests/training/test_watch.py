"""A watched run whose step is a toy: what is written, when, and what it is worth after a crash."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magma_jax.config import ConfigError
from magma_jax.families.magma import MAGMA
from magma_jax.runtime.sharding import make_mesh
from magma_jax.training import watch as watching
from magma_jax.training.monitor.profiler import StepRange
from magma_jax.training.monitor.writers import WatchConfig, read_lines
from magma_jax.training.run.config import completed
from magma_jax.training.run.program import build_program
from magma_jax.training.run.setup import Run
from magma_jax.training.step.optim import make_schedule
from magma_jax.training.step.train_step import TrainState
from magma_jax.training.watch import Watch, duration, scaled
from tests import tiny
from tests.training import events

DATA = tiny.dataset()


@jax.jit
def toy_step(state, batch):
    loss = 10.0 - state.step + 0.0 * batch["tokens"].sum()
    metrics = {"loss": loss, "accuracy": jnp.float32(0.5), "grad_norm": jnp.float32(2.0)}
    updates = optax.ScaleByScheduleState(state.opt_state.count + 1)
    return dataclasses.replace(state, step=state.step + 1, opt_state=updates), metrics


@pytest.fixture(scope="module")
def program():
    return build_program(
        MAGMA, completed(MAGMA, tiny.run_config()), make_mesh(tiny.run_config().mesh, jax.devices()[:1])
    )


@pytest.fixture
def make_run(program, tmp_path):
    def make(after=0, **changes):
        config = completed(MAGMA, tiny.run_config(**{"steps": 10, "log_every": 2} | changes))
        state = TrainState(jnp.int32(after), {}, {}, optax.ScaleByScheduleState(jnp.int32(after)))
        return Run(config, tmp_path, DATA, program, {}, state)

    return make


def batch(length=20, rows=4):
    tokens = np.full((rows, length), DATA.tokenizer.eos_id, np.int32)
    tokens[:, :5] = 1
    return {"tokens": tokens, "labels": tokens}


def drive(run, *, until=None, lengths=(20,), step_function=toy_step, **options):
    with Watch(run, **options) as watch:
        watch.counts = lambda: {"skipped_steps": int(run.state.step) // 3}
        for step in range(int(run.state.step) + 1, (until or run.config.steps) + 1):
            with watch.waiting():
                rows = batch(lengths[step % len(lengths)])
            watch.begin(step, rows)
            run.state, metrics = step_function(run.state, rows)
            watch.end(step, metrics)


def lines(run):
    return read_lines(run.workdir / "metrics.jsonl")[0]


def test_figures_of_a_run(make_run, monkeypatch, capsys):
    monkeypatch.setattr(watching, "peak_flops", lambda kind: 1e12)
    monkeypatch.setattr(watching, "device_memory", lambda: 12345)
    run = make_run()
    drive(run)
    read = lines(run)
    assert [line["step"] for line in read] == [2, 4, 6, 8, 10]
    assert [line["loss"] for line in read] == [9.0, 7.0, 5.0, 3.0, 1.0]
    assert all((line["accuracy"], line["grad_norm"], line["device_memory_bytes"]) == (0.5, 2.0, 12345) for line in read)
    assert "compile_seconds" in read[0]
    assert "compile_seconds" not in read[1]
    # Four rows of five tokens and an end of text; operations by the count of the model.
    program = run.program
    batch = {"tokens": (4, 20), "images": (4, 64, 64, 3)}
    flops = MAGMA.flops(run.config.model, program.params, program.labels, batch).total
    for line in read:
        assert line["tokens_per_second"] == pytest.approx(line["samples_per_second"] * 6)
        assert line["model_flops_per_second"] == pytest.approx(flops / line["step_seconds"], rel=1e-6)
        assert line["mfu"] == pytest.approx(line["model_flops_per_second"] / 1e12, rel=1e-6)
        assert 0 <= line["input_wait"] <= 1
    # The count that was known when a line was written: one step later, but for the last.
    assert [line["skipped_steps"] for line in read] == [1, 1, 2, 3, 3]
    schedule = make_schedule(run.config.optim, 1e-2)
    for line in read:
        assert line["learning_rate"] == pytest.approx(float(schedule(line["step"] - 1)), rel=1e-6)
        assert line["encoder_learning_rate"] == pytest.approx(line["learning_rate"] / 10, rel=1e-6)

    shown = events.scalars(run.workdir / "tensorboard")
    assert shown["train/loss"] == {2: 9.0, 4: 7.0, 6: 5.0, 8: 3.0, 10: 1.0}
    assert {"train/learning_rate", "speed/mfu", "speed/input_wait", "speed/step_seconds"} <= set(shown)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("step 1 took ")
    assert told[1].startswith("step 2/10  loss 9.000  ")
    assert told[1].endswith(" left")
    assert "MFU" in told[1]
    assert told[-1].startswith("steps 1 to 10 took ")


def test_without_a_known_peak_there_is_no_mfu(make_run):
    run = make_run(steps=4, watch=WatchConfig(tensorboard=False))
    drive(run)
    assert all("mfu" not in line and line["model_flops_per_second"] > 0 for line in lines(run))
    assert not (run.workdir / "tensorboard").exists()


def test_after_a_crash_every_step_is_there_once(make_run):
    drive(make_run(), until=8)
    with (make_run().workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = make_run(after=4)
    drive(resumed)
    assert [line["step"] for line in lines(resumed)] == [2, 4, 6, 8, 10]
    written = (resumed.workdir / "metrics.jsonl").read_text().splitlines()
    assert len(written) == 5
    assert all(json.loads(line) for line in written)
    seconds = [line["seconds"] for line in lines(resumed)]
    assert seconds == sorted(seconds)
    assert list(events.scalars(resumed.workdir / "tensorboard")["train/loss"]) == [2, 4, 6, 8, 10]


def test_a_step_does_not_wait_for_its_own_figures(make_run):
    """Figures of step 2 are read once step 3 has been handed over; nothing is read in between."""
    run = make_run()
    with Watch(run) as watch:
        for step in (1, 2, 3):
            watch.begin(step, batch())
            run.state, metrics = toy_step(run.state, batch())
            watch.end(step, metrics)
            assert len(lines(run)) == (1 if step == 3 else 0)


def test_every_new_shape_is_measured_apart(make_run, capsys):
    drive(make_run(steps=6), lengths=(20, 30))
    told = [line for line in capsys.readouterr().err.splitlines() if "compilation included" in line]
    assert [line.split(" took")[0] for line in told] == ["step 1", "step 2"]


def test_a_loss_that_is_no_number_is_left_out_of_json(make_run):
    run = make_run(steps=2)
    drive(run, step_function=lambda state, rows: (state, {"loss": jnp.float32("nan"), "grad_norm": jnp.float32(1)}))
    assert "NaN" not in (run.workdir / "metrics.jsonl").read_text()
    assert "loss" not in lines(run)[0]
    assert lines(run)[0]["grad_norm"] == 1.0


def test_a_process_that_holds_half_of_the_rows_counts_all(make_run):
    run = make_run(steps=4, batch_size=8)
    drive(run)
    for line in lines(run):
        assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(8)
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(48)


def test_another_process_writes_nothing(make_run, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = make_run(steps=4)
    drive(run)
    assert not list(run.workdir.iterdir())
    assert capsys.readouterr().err == ""


def test_a_profile_appears_and_is_told_of(make_run, capsys):
    run = make_run(steps=4)
    drive(run, profile=StepRange(2, 3))
    (trace,) = (run.workdir / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("profile of steps 2:3")]
    assert len(told) == 1
    assert str(run.workdir / "tensorboard") in told[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10-15", "expected FIRST:LAST, such as 10:15"),
        ("10:", "expected FIRST:LAST"),
        ("0:5", "the first step is 1"),
        ("7:5", "LAST is not before FIRST"),
    ],
)
def test_wrong_ranges(text, message):
    with pytest.raises(ConfigError, match=message):
        StepRange.parse(text)


def test_ranges_that_the_run_does_not_take(make_run):
    assert StepRange.parse("3:3") == (3, 3)
    with pytest.raises(ConfigError, match="--profile-steps 5:11: the run ends with step 10"):
        Watch(make_run(), StepRange(5, 11))
    with pytest.raises(ConfigError, match="--profile-steps 4:6: the run resumes after step 4"):
        Watch(make_run(after=4), StepRange(4, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"no images in a split 'validation' \(its splits: train, test\)"),
        ({"samples_split": "test", "samples_tokens": 60}, "positions, but the context holds 64; lower it"),
    ],
)
def test_samples_that_cannot_be_had(make_run, changes, message):
    with pytest.raises(ConfigError, match=message):
        Watch(make_run(watch=WatchConfig(samples_every=2, **changes)))


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (0.04, 9.9, 52.4, 312, 12000)] == [
        "0.0 s",
        "9.9 s",
        "52 s",
        "5 min 12 s",
        "3 h 20 min",
    ]
    texts = ["{:.3g}{}".format(*scaled(value)) for value in (0, 950, 12345, 4.56e6, 7.9e13, 2e16)]
    assert texts == ["0", "950", "12.3k", "4.56M", "79T", "20P"]
