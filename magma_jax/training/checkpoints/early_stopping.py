"""When a run is validated, which of its steps is the best, and when it ends early."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """How a run is validated; by default not at all.

    Attributes:
        every: steps between validations; the last step is always validated. 0: no validation.
        split: split of the dataset that is validated on.
        ema: whether the moving averages of weights are validated in place of the weights, and are the run's result.
        samples: at most this many samples, evenly spaced in the order of the split; the same ones every time.
        patience: validations in a row without an improvement that end the run. 0: the run never ends early.
        min_delta: by how much the loss must fall to be an improvement.
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
    """The best validation so far; part of the checkpoint, so that a resumed run ends where it would have ended.

    Attributes:
        step: of the lowest validation loss, None before the first validation.
        loss: that loss, in nats a token.
        waited: validations since then.
        validated: step of the last validation.
    """

    step: int | None = None
    loss: float | None = None
    waited: int = 0
    validated: int = 0

    def after(self, step: int, loss: float, min_delta: float = 0.0) -> "BestStep":
        """The best step once ``step`` has been validated; a loss that is no number is never an improvement."""
        if loss < (float("inf") if self.loss is None else self.loss - min_delta):
            return BestStep(step, loss, validated=step)
        return dataclasses.replace(self, waited=self.waited + 1, validated=step)

    def exhausts(self, config: ValidationConfig) -> bool:
        """Whether the run has waited long enough for an improvement."""
        return 0 < config.patience <= self.waited

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``BestStep(**values)`` turns into the same object."""
        return dataclasses.asdict(self)
