"""Speed on a clock that the test moves."""

import numpy as np
import pytest

from magma_jax.training.monitor.throughput import Meter, count_batch


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(meter, clock, steps, *, wait=0.1, work=0.4):
    for _ in range(steps):
        with meter.waiting():
            clock.now += wait
        clock.now += work
        meter.count(samples=8, tokens=50, flops=1000)


def test_speed_is_that_of_the_window_not_of_the_whole_run():
    clock = Clock()
    meter = Meter(clock)
    run(meter, clock, 10, wait=1.0, work=9.0)
    meter.figures(meter.cut(), None)
    run(meter, clock, 4)
    assert meter.figures(meter.cut(), peak=8000.0) == pytest.approx(
        {
            "samples_per_second": 16.0,
            "tokens_per_second": 100.0,
            "step_seconds": 0.5,
            "input_wait": 0.2,
            "model_flops_per_second": 2000.0,
            "mfu": 0.25,
        }
    )
    assert meter.total.samples == 14 * 8


def test_a_step_that_is_under_way_when_figures_are_read_belongs_to_the_next_window():
    clock = Clock()
    meter = Meter(clock)
    run(meter, clock, 2)
    window = meter.cut()
    meter.count(samples=8, tokens=50, flops=1000)  # handed to the device, not finished
    assert meter.figures(window, None)["step_seconds"] == pytest.approx(0.5)
    clock.now += 0.5
    assert meter.figures(meter.cut(), None)["step_seconds"] == pytest.approx(0.5)


def test_pauses_and_compiled_steps_take_no_time():
    clock = Clock()
    meter = Meter(clock)
    with meter.waiting():
        clock.now += 3.0
    clock.now += 20.0
    meter.skip(20.0)  # the first step
    run(meter, clock, 2)
    with meter.paused():
        clock.now += 50.0
    with meter.waiting():
        clock.now += 0.1
    clock.now += 30.0
    meter.skip(30.0)  # a batch of another length
    run(meter, clock, 2)
    figures = meter.figures(meter.cut(), None)
    assert figures["step_seconds"] == pytest.approx(0.5)
    assert figures["input_wait"] == pytest.approx(0.2)
    assert meter.paused_seconds == 50.0
    assert meter.elapsed == pytest.approx(23.0 + 1.0 + 50.0 + 30.1 + 1.0)


def test_a_window_without_steps_has_no_figures():
    meter = Meter(Clock())
    assert meter.figures(meter.cut(), 1.0) == {}


def test_tokens_that_are_not_padding():
    eos = 9
    rows = [
        [1, 2, 3, 9, 9, 9],  # three and the end of text
        [1, 2, 3, 4, 5, 9],
        [1, 2, 3, 4, 5, 6],  # a block of running text
        [1, 9, 2, 9, 9, 9],  # two texts in a row
        [9, 9, 9, 9, 9, 9],
    ]
    tokens = [count_batch({"tokens": np.array([row], np.int32)}, eos)[1] for row in rows]
    assert tokens == [4, 6, 6, 4, 1]
    assert count_batch({"tokens": np.array(rows, np.int32)}, eos) == (5, 21)


def test_packed_rows_say_themselves_what_is_in_them():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    batch = {"tokens": np.full((3, 6), 9), "segments": segments}
    assert count_batch(batch, 9) == (3, 11)
