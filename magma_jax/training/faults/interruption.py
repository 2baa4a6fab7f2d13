"""Stopping a run from outside by SIGTERM (sent by schedulers) or Ctrl-C. The current step is finished first."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that records stop signals; the loop polls it after every step.

    The first signal is recorded, the second has its default effect: Ctrl-C twice stops at once. With several processes
    a signal to one of them stops all after the same step; JAX's coordination service agrees on it in the background,
    so polling is free. Outside the main thread, which alone receives signals, it never stops.
    """

    def __init__(self):
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}  # signal to its previous handler

    def reached(self, step: int) -> bool:
        """Whether the run stops after ``step``, equal in all processes; call it once per finished step."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = self.signal or signal.SIGTERM.name
                return True
            return False
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # With several processes the coordination service handles SIGTERM and informs the others.
            wanted = SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
            self._previous = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number in list(self._previous):
            signal.signal(number, self._previous.pop(number))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, self._previous.pop(number))
        # os.write, because the signal may have interrupted a print.
        os.write(2, f"\n{self.signal}: finishing this step, then saving; once more stops at once\n".encode())
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
