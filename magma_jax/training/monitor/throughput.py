"""How fast a run is: samples, tokens and operations a second over the steps since the last figures."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np


@dataclasses.dataclass
class Window:
    """What happened in the steps since the last figures.

    Attributes:
        steps: optimizer steps.
        samples: in their batches, over all processes.
        tokens: tokens in them that are not padding, without the positions of images.
        flops: operations, see ``training.step.flops``.
        waited: seconds in which the loop waited for a batch.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    waited: float = 0.0


class Meter:
    """Adds up steps, and measures time on ``clock`` (seconds) without what is not training.

    Time stands still inside ``paused``: for checkpoints, evaluation and compilation. Steps run asynchronously, so
    the caller makes sure that the device has finished before it pauses or takes figures.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._started = self._mark = clock()
        self._window = Window()
        self._last_wait = 0.0
        self.paused_seconds = 0.0
        self.total = Window()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, pauses included."""
        return self._clock() - self._started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time in which the loop waits for a batch."""
        before = self._clock()
        yield
        self._last_wait = self._clock() - before
        self._window.waited += self._last_wait

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training."""
        before = self._clock()
        yield
        passed = self._clock() - before
        self._mark += passed
        self.paused_seconds += passed

    def skip(self, seconds: float | int) -> None:
        """Leaves out a step that took ``seconds`` and has just finished, and the wait for its batch."""
        if self._window.steps:
            self._window.waited -= self._last_wait
            self._mark += seconds + self._last_wait
        else:
            self._window = Window()
            self._mark = self._clock()

    def count(self, samples: int, tokens: int, flops: int) -> None:
        """Adds one step."""
        for window in (self._window, self.total):
            window.steps += 1
            window.samples += samples
            window.tokens += tokens
            window.flops += flops

    def cut(self) -> Window:
        """Ends the window at the last counted step and begins the next; ``figures`` then says when it was over."""
        window, self._window = self._window, Window()
        return window

    def figures(self, window: Window, peak: float | int | None) -> dict[str, float]:
        """Speed in a window whose last step has just finished; empty for a window without steps.

        ``peak`` are the operations a second that all devices together can do, if that is known.
        """
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        if not window.steps or seconds <= 0:
            return {}
        figures = {
            "samples_per_second": window.samples / seconds,
            "tokens_per_second": window.tokens / seconds,
            "step_seconds": seconds / window.steps,
            "input_wait": min(window.waited / seconds, 1.0),
            "model_flops_per_second": window.flops / seconds,
        }
        return figures if peak is None else figures | {"mfu": figures["model_flops_per_second"] / peak}


def count_batch(batch: Mapping[str, np.ndarray], pad_id: int) -> tuple[int, int]:
    """Samples of a batch, and their tokens without padding; see ``data.batches.batching`` for batches.

    Rows that are not packed are padded with ``pad_id``, which is also the end of text: the first of those at the end
    of a row counts.
    """
    tokens = batch["tokens"]
    if "segments" in batch:
        return int(batch["segments"].max(axis=1).sum()), int((batch["segments"] > 0).sum())
    rows, length = tokens.shape
    is_text = tokens != pad_id
    # Behind the last token that is text stands one end of text, unless the row is full.
    last = np.where(is_text.any(axis=1), length - is_text[:, ::-1].argmax(axis=1), 0)
    return rows, int(np.minimum(last + 1, length).sum())


def device_memory() -> int | None:
    """Most bytes that were in use so far on any device of this process; None where devices do not tell, as on CPUs."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
    return max(peaks) if peaks else None
