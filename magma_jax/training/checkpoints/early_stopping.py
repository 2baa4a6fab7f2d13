"""Validation schedule, best step and early stopping."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """How a run is validated; by default not at all.

    Attributes:
        every: steps between validations; the last step is always validated. 0: no validation.
        split: split of the dataset to validate on.
        ema: whether the moving averages of weights are validated instead of the weights, and are the run's result.
        samples: maximum number of samples, evenly spaced in the order of the split; the same ones every time.
        patience: consecutive validations without an improvement that end the run. 0: the run never ends early.
        min_delta: decrease of the loss that counts as an improvement.
    """

    every: int = 0
    split: str = "validation"
    samples: int = 512
    ema: bool = False
    patience: int = 0
    min_delta: float = 0.0

    def __post_init__(self):
        for name in ("every", "patience", "min_delta"):
            if getattr(self, name) < 0:
                raise ValueError(f"validation.{name} must not be negative, got {getattr(self, name)}")
        if self.samples < 1:
            raise ValueError(f"validation.samples must be at least 1, got {self.samples}")
        if self.patience and not self.every:
            raise ValueError("validation.patience needs validation.every, the steps between validations")


@dataclasses.dataclass(frozen=True)
class BestStep:
    """The best validation so far; part of the checkpoint, so that a resumed run ends at the same step.

    Attributes:
        step: step of the lowest validation loss, None before the first validation.
        loss: that loss, in nats per token.
        waited: number of validations since then.
        validated: step of the last validation.
    """

    step: int | None = None
    loss: float | None = None
    waited: int = 0
    validated: int = 0

    def after(self, step: int, loss: float, min_delta: float = 0.0) -> "BestStep":
        """The best step after ``step`` has been validated; a NaN loss is never an improvement."""
        if loss < (float("inf") if self.loss is None else self.loss - min_delta):
            return BestStep(step, loss, validated=step)
        return dataclasses.replace(self, waited=self.waited + 1, validated=step)

    def exhausts(self, config: ValidationConfig) -> bool:
        """Whether the patience for an improvement is used up."""
        return 0 < config.patience <= self.waited

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``BestStep(**values)`` turns into the same object."""
        return dataclasses.asdict(self)
