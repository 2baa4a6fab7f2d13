"""Profiler traces of selected steps for TensorBoard, and the flag that selects them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from magma_jax.config import ConfigError


class StepRange(NamedTuple):
    """Optimizer steps from ``first`` to ``last``, both included; a run's first step is 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "StepRange":
        """Reads ``10:15``.

        Raises:
            ConfigError: not two numbers, or not in ascending order.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise ConfigError(f"--profile-steps {text}: expected FIRST:LAST, such as 10:15")
        steps = cls(int(match[1]), int(match[2]))
        if not 1 <= steps.first <= steps.last:
            raise ConfigError(f"--profile-steps {text}: the first step is 1, and LAST is not before FIRST")
        return steps

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


class Profiler:
    """Traces ``steps``, if any, into ``folder``.

    Args:
        steps: steps to trace; None for none.
        folder: folder of the trace.
        done: steps that the run has already finished.
        end: last step of the run.
        say: function that logs a line.

    Raises:
        ConfigError: steps outside the run.
    """

    def __init__(self, steps: StepRange | None, folder: Path, *, done: int, end: int, say: Callable[[str], None]):
        if steps and steps.last > end:
            raise ConfigError(f"--profile-steps {steps}: the run ends with step {end}")
        if steps and steps.first <= done:
            raise ConfigError(f"--profile-steps {steps}: the run resumes after step {done}")
        self._steps, self._folder, self._say = steps, folder, say
        self._tracing = False

    def starts(self, step: int) -> bool:
        """Whether ``step`` is the first to trace."""
        return self._steps is not None and step == self._steps.first

    def ends(self, step: int) -> bool:
        """Whether ``step`` is the last to trace."""
        return self._tracing and self._steps is not None and step == self._steps.last

    def start(self) -> None:
        """Begins the trace."""
        jax.profiler.start_trace(str(self._folder))
        self._tracing = True

    def close(self) -> None:
        """Ends a running trace and logs its location; the device must have finished the traced steps."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self._say(
                f"profile of steps {self._steps}: tensorboard --logdir {self._folder} "
                "(its profile page comes with: pip install tensorboard xprof)"
            )
