"""Which step is the best, and when a run has waited long enough."""

import json

import pytest

from magma_jax.training.checkpoints.early_stopping import BestStep, ValidationConfig


def _follow(losses, min_delta=0.0):
    best = BestStep()
    for step, loss in enumerate(losses, 1):
        # As a run that is interrupted after every validation would see it.
        best = BestStep(**json.loads(json.dumps(best.to_json()))).after(step, loss, min_delta)
    return best


@pytest.mark.parametrize(
    ("losses", "min_delta", "expected"),
    [
        ([], 0.0, BestStep()),
        ([3.0, 2.0, 1.0], 0.0, BestStep(3, 1.0, 0, 3)),
        ([3.0, 1.0, 2.0, 1.0], 0.0, BestStep(2, 1.0, 2, 4)),  # as good is not better
        ([3.0, 2.95, 2.92], 0.1, BestStep(1, 3.0, 2, 3)),  # small steps do not add up to an improvement
        ([3.0, 2.95, 2.85], 0.1, BestStep(3, 2.85, 0, 3)),
        ([3.0, float("nan"), float("inf")], 0.0, BestStep(1, 3.0, 2, 3)),
        ([float("nan")], 0.0, BestStep(None, None, 1, 1)),
    ],
)
def test_the_best_step_and_the_validations_since(losses, min_delta, expected):
    assert _follow(losses, min_delta) == expected


def test_patience_counts_validations_in_a_row_and_zero_is_endless():
    waited = _follow([1.0, 2.0, 2.0])
    assert waited.exhausts(ValidationConfig(every=1, patience=2))
    assert not waited.exhausts(ValidationConfig(every=1, patience=3))
    assert not waited.exhausts(ValidationConfig(every=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 3}, "patience needs validation.every"),
        ({"every": -1}, "every must not be negative, got -1"),
        ({"every": 1, "min_delta": -0.1}, "min_delta must not be negative"),
        ({"every": 1, "samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(ValueError, match=message):
        ValidationConfig(**values)
